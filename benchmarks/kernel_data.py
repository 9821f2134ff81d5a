"""Attention inputs with the structure of real prompts: sinks, a local band, needles, heads of unlike strength."""

from __future__ import annotations

import torch

# Share of causal blocks: published for 4K to 128K; 2.6 % at 256K continues them.
DENSITY = {4096: 0.70, 8192: 0.46, 16384: 0.30, 32768: 0.16, 65536: 0.094, 131072: 0.049, 262144: 0.026}


def structured_qkv(
    seq_len: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, seq_len, heads, dim] and k, v [1, seq_len, kv_heads, dim].

    Keys carry a theme that drifts from block to block. Queries look for the theme of where they are (the local
    band), for those of a few blocks that all queries share and of a few of their own (needles), and for the sink.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    num_blocks, group = -(-seq_len // 128), heads // kv_heads
    theme = normal(num_blocks, kv_heads, dim)
    drift = 0.9
    for block in range(1, num_blocks):
        theme[block] = drift * theme[block - 1] + (1 - drift**2) ** 0.5 * theme[block]
    sink = normal(kv_heads, dim)
    shared = torch.rand(num_blocks, kv_heads, generator=g, device=device) < 0.01

    k = torch.empty(seq_len, kv_heads, dim, device=device, dtype=dtype)
    q = torch.empty(seq_len, heads, dim, device=device, dtype=dtype)
    strength = torch.exp(0.5 * normal(heads, 1))
    kv_of = torch.arange(heads, device=device) // group
    hot = normal(kv_heads, dim)
    for start in range(0, num_blocks, 64):
        end = min(start + 64, num_blocks)
        keys = theme[start:end] + 1.2 * shared[start:end, :, None] * hot
        if start == 0:
            keys[0] += 1.5 * sink
        needles = (
            torch.rand(end - start, heads, 4, generator=g, device=device)
            * torch.arange(start, end, device=device)[:, None, None]
        ).long()
        wanted = 0.5 * theme[start:end, kv_of] + 0.4 * hot[kv_of] + 0.5 * sink[kv_of]
        wanted = wanted + 0.35 * theme[needles, kv_of[None, :, None]].sum(dim=2)
        tokens = slice(start * 128, min(end * 128, seq_len))
        n = tokens.stop - tokens.start
        k[tokens] = (keys.repeat_interleave(128, 0)[:n] + normal(n, kv_heads, dim)).to(dtype)
        q[tokens] = ((strength * wanted).repeat_interleave(128, 0)[:n] + normal(n, heads, dim)).to(dtype)
    v = normal(seq_len, kv_heads, dim).to(dtype)
    return q[None], k[None], v[None]
