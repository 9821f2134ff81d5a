"""What is done before serving."""

import torch

from tests.support.flash_attn_step import DTYPE, EXACT, HEAD_SIZE, HEADS, KV_HEADS, Classes
from tests.support.vllm_side import MAX_TOKENS
from vllm_flashprefill.backend import warmup


def test_scratch_is_reserved_with_the_layer(calls):
    from vllm_flashprefill.kernels.workspace import scratch_bytes

    classes = Classes(EXACT)
    needed = scratch_bytes(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        max_query_tokens=MAX_TOKENS,
        max_seq_len=MAX_TOKENS,
        device=torch.device("cpu"),
    )
    assert classes.impl._workspace.num_bytes >= needed > 0
    assert Classes(EXACT).impl._workspace is classes.impl._workspace


def test_kernels_are_compiled_once_for_each_kind_of_layer(calls, monkeypatch):
    from vllm.config import set_current_vllm_config

    monkeypatch.setattr(warmup, "_compiled", set())
    ran = []
    paged = warmup.flash_prefill_paged

    def record(q, kv, *args, **kwargs):
        ran.append((*q.shape[1:], *kv.k.shape[1:]))
        return paged(q, kv, *args, **kwargs)

    monkeypatch.setattr(warmup, "flash_prefill_paged", record)
    classes = Classes(EXACT, 32)
    impls = [classes.impl, Classes(EXACT).impl, Classes(EXACT, sliding_window=64).impl]
    # Builders are made where vLLM's config is the current one, which its cache's layout is taken from.
    with set_current_vllm_config(classes.vllm_config):
        for page_size in (32, 32, 128):
            warmup.compile_kernels(
                impls, classes.builder.new_cache, page_size=page_size, dtype=DTYPE, device=torch.device("cpu")
            )
    assert ran == [(HEADS, HEAD_SIZE, page_size, KV_HEADS, HEAD_SIZE) for page_size in (32, 128)]
