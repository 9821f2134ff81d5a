"""Small inputs in float32, for what runs without kernels."""

import torch
from hypothesis import strategies as st

SCALE = 0.25


def tensors(num_tokens, seq_len, *, heads=4, kv_heads=2, dim=16, seed=0, dtype=torch.float32):
    """Queries and keys with a few strong directions, so that blocks differ in score."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, heads, dim, generator=generator)
    k = torch.randn(seq_len, kv_heads, dim, generator=generator)
    v = torch.randn(seq_len, kv_heads, dim, generator=generator)
    theme = torch.randn(-(-seq_len // 128), kv_heads, dim, generator=generator)
    k += 2 * theme.repeat_interleave(128, dim=0)[:seq_len]
    return q.to(dtype), k.to(dtype), v.to(dtype)


request_strategy = st.tuples(
    st.one_of(st.sampled_from([1, 127, 128, 129, 256]), st.integers(1, 900)),  # tokens of this step
    st.one_of(st.sampled_from([0, 0, 1, 127, 128, 129, 512]), st.integers(0, 900)),  # tokens before it
    st.integers(0, 500),  # tokens still to come
)
