"""Engines of several GPUs: at alpha 0 the default backend's tokens, above it the blocks that one GPU keeps."""

import math

import numpy as np
import pytest
import torch

from tests.gpu.test_models import OPTIONS, check_answer, check_stats, make_job, run
from tests.support.model_kinds import Kind, llama, write

# Without NVLink multicast, which not every host can have.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
SPARSE = {**OPTIONS, "FLASHPREFILL_ALPHA": "0.9", "FLASHPREFILL_PIECE_SIZE": "0"}
TENSOR_2, TENSOR_4, PIPELINE_2 = (
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4},
    {"pipeline_parallel_size": 2},
)


def llama_on(ranks):
    """The kind with what each GPU of a group is to count: all of them its own part of the heads, for all tokens."""
    if torch.cuda.device_count() < math.prod(ranks.values()):
        pytest.skip(f"{torch.cuda.device_count()} GPUs, not {math.prod(ranks.values())}")
    return Kind(llama, 3 * ranks.get("tensor_parallel_size", 1), engine=ranks)


@pytest.mark.parametrize("ranks", [TENSOR_2, TENSOR_4, PIPELINE_2], ids=str)
def test_alpha_0_is_vllms_own(ranks, tmp_path, plugin_path):
    kind = llama_on(ranks)
    write(kind, tmp_path)
    job = make_job(kind, tmp_path)
    expected, _ = run(job, plugin_path, NO_MULTICAST)
    result, log = run(job, plugin_path, {**OPTIONS, **NO_MULTICAST})
    assert "FlashPrefill is registered" in log
    check_stats(kind, result)
    for got, other in zip(result["answers"], expected["answers"], strict=True):
        check_answer(got, other, kind.noise)


@pytest.mark.parametrize("ranks", [TENSOR_2, TENSOR_4, PIPELINE_2], ids=str)
def test_ranks_keep_the_blocks_that_one_keeps(ranks, tmp_path, plugin_path):
    kind, one = llama_on(ranks), llama_on({})
    write(kind, tmp_path)
    expected, _ = run(make_job(one, tmp_path), plugin_path, SPARSE)
    result, _ = run(make_job(kind, tmp_path), plugin_path, {**SPARSE, **NO_MULTICAST})
    stats, other = result["stats"], expected["stats"]
    print(f"kept {stats['kept_blocks']}, on one GPU {other['kept_blocks']}, of {other['visible_blocks']}")
    # Query heads are never on two GPUs; KV heads can be.
    assert stats["visible_blocks"] == other["visible_blocks"]
    assert stats["kept_blocks"] == pytest.approx(other["kept_blocks"], rel=0.01)
    assert 0.1 * stats["visible_blocks"] < stats["kept_blocks"] < 0.9 * stats["visible_blocks"]
    assert stats["sparse_tokens"] * one.sparse_layers == other["sparse_tokens"] * kind.sparse_layers
    # A block whose score is within rounding of the limit may be another one, which moves single log-probabilities by up
    # to 1 and their mean by up to 0.08. Dense attention and alpha 1 are 0.5 to 1 apart in the mean.
    for got, other in zip(result["answers"], expected["answers"], strict=True):
        assert np.abs(np.array(got["prompt"]) - other["prompt"]).mean() <= 0.25
