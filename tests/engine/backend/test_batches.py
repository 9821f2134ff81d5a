"""A few of the random batches that the GPU tests run, on CPU tensors with PyTorch in place of vLLM's kernels."""

import importlib

import pytest
import torch

from tests.support.attention import flash_attention, plain_kernels
from tests.support.batch_checks import Pair, check, run_batches
from tests.support.e4m3 import take_e4m3_caches
from tests.support.engines import vllm_version
from tests.support.random_batch import Batch
from tests.support.request import Request
from tests.support.vllm_side import Shape


def whole_and_causal(**arguments):
    assert arguments["causal"] is True and arguments["q"].shape[0] == arguments["cu_seqlens_q"][-1]
    flash_attention(**arguments)


def schedule(*, batch_size, **options):
    return torch.full((1 + 4 * (batch_size + -batch_size % 4),), batch_size, dtype=torch.int32)


@pytest.fixture(autouse=True)
def hopper_kernels(monkeypatch):
    flash_attn = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 3)
    take_e4m3_caches(monkeypatch)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda *_, **__: True, raising=False)
    with plain_kernels(whole_and_causal):
        yield


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 2, 64, torch.bfloat16, 16),
        Shape(14, 2, 64, torch.float16, 128),
        Shape(4, 4, 128, torch.bfloat16, 32),
        Shape(4, 2, 64, torch.bfloat16, 16, "fp8"),
        Shape(4, 2, 64, torch.bfloat16, 32, "fp8_e4m3", scales_by_head=True),
        Shape(4, 2, 64, torch.bfloat16, 16, has_sinks=True),
    ],
    ids=str,
)
def test_batches(shape):
    if shape.has_sinks and vllm_version() == "0.10.0":
        pytest.skip("this vLLM has no attention with sinks")
    kept, visible = run_batches(shape, torch.device("cpu"), range(4), longest=500)
    assert 0 < kept < visible


@pytest.mark.parametrize("said", ["lengths", "which", "nothing"])
@pytest.mark.parametrize("num_dense_tail_blocks", [0, 1])
def test_decodes_with_drafted_tokens_are_vllms_own(said, num_dense_tail_blocks):
    """Where the host counts refused ones too, a plan made of its lengths would read what is not there yet."""
    shape = Shape(4, 2, 64, torch.bfloat16, 16)
    requests = [Request(8, 500, -7, refused=7), Request(300), Request(6, 320, -5)]
    check(
        Batch(
            seed=1,
            page_size=16,
            requests=requests,
            padding=0,
            heads_first=False,
            fused_qkv=False,
            full_graphs=False,
            alpha=1.0,
            num_dense_tail_blocks=num_dense_tail_blocks,
            min_sparse_tokens=1,
            said=said,
        ),
        Pair(shape, torch.device("cpu"), full_graphs=False),
    )
