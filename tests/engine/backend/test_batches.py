"""A few of the random batches that the GPU tests run, on CPU tensors with PyTorch in place of vLLM's kernels."""

import importlib

import pytest
import torch

from tests.support.attention import flash_attention, plain_kernels
from tests.support.batch_checks import run_batches
from tests.support.engines import vllm_version
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
    with plain_kernels(whole_and_causal):
        yield


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
