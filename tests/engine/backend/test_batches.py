"""A few of the random batches that the GPU tests run, on CPU tensors with PyTorch in place of vLLM's kernels."""

import importlib
import itertools
import math

import pytest
import torch

from tests.support.backend_cases import Shape, run_batches
from tests.support.engines import vllm_version
from vllm_flashprefill.backend import stats


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


def write_cache(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    page_size = k_cache.shape[1]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    for x, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        x = x[: len(slot_mapping)][written]
        if kv_cache_dtype == "fp8":
            x = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slots // page_size, slots % page_size] = x


def flash_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **options):
    """Probabilities are in the output's precision, as in vLLM's kernels."""
    assert causal is True and q.shape[0] == cu_seqlens_q[-1]
    for row, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        seq_len = int(seqused_k[row])
        pages = block_table[row, : math.ceil(seq_len / k.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:seq_len].float() for cache in (k, v))
        queries = q[start:end].float()
        if q.dtype == torch.float8_e4m3fn:
            scales = (options[name][row, :, None] for name in ("q_descale", "k_descale", "v_descale"))
            queries, keys, values = (x * s[:1] for x, s in zip((queries, keys, values), scales, strict=True))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[2], dim=1) for x in (keys, values))
        logits = softmax_scale * torch.einsum("thd,shd->hts", queries, keys)
        hidden = torch.ones(end - start, seq_len, dtype=torch.bool).triu(seq_len - (end - start) + 1)
        p = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).to(out.dtype)
        out[start:end] = torch.einsum("hts,shd->thd", p.float(), values)


def schedule(*, batch_size, **options):
    return torch.full((1 + 4 * (batch_size + -batch_size % 4),), batch_size, dtype=torch.int32)


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    flash_attn = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write_cache, raising=False)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 3)
    monkeypatch.setattr(stats, "_recorder", None)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 2, 64, torch.bfloat16, 16),
        Shape(14, 2, 64, torch.float16, 128),
        Shape(4, 4, 128, torch.bfloat16, 32),
        Shape(4, 2, 64, torch.bfloat16, 16, "fp8"),
    ],
    ids=str,
)
def test_batches(shape):
    if shape.quantised and vllm_version() != "0.24.0":
        pytest.skip("this vLLM makes no configuration with an fp8 cache on a CPU")
    kept, visible = run_batches(shape, torch.device("cpu"), range(4), longest=500)
    assert kept == visible > 0 if shape.quantised else 0 < kept < visible
