import pytest
import torch

from vllm_flashprefill import FlashPrefillConfig

TOKENS, HEADS, KV_HEADS, HEAD_SIZE = 1_000_000, 32, 8, 128


def test_scratch_at_a_million_tokens():
    """At most 256 MiB beyond the inputs and the output, all kernels and the schedule counted.

    Pieces are of 16 keys, as in an engine for sequences this long.
    """
    from vllm_flashprefill.api import flash_prefill

    needed = 2 * TOKENS * HEAD_SIZE * (2 * HEADS + 2 * KV_HEADS) + (1 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    torch.cuda.empty_cache()
    q, k, v = (
        torch.randn(1, TOKENS, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    out = torch.empty_like(q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Random keys have nothing to prune by score: only what is always kept is computed.
    flash_prefill(q, k, v, config=FlashPrefillConfig(alpha=1.0, piece_size=16), out=out)
    scratch = torch.cuda.max_memory_allocated() - before
    print(f"scratch at {TOKENS} tokens: {scratch / 2**20:.1f} MiB")
    assert scratch <= 256 << 20
    assert out[0, ::9973].isfinite().all()
