"""What vLLM's sleep takes is what is allocated while layers, caches and builders are made; level 2 keeps none of it."""

import torch

from tests.support.flash_attn_step import SPARSE, Classes, Step
from tests.support.request import Request
from tests.support.vllm_side import counted
from vllm_flashprefill.backend.device_counts import device_counts
from vllm_flashprefill.kernels.workspace import shared_workspace


def test_counters_are_made_at_the_first_sparse_request_and_scratch_may_be_lost_between_steps(calls):
    classes = Classes(SPARSE)
    classes.run(Step([Request(100)], 16, 0))
    assert device_counts.cache_info().currsize == 0
    step = Step([Request(700), Request(400, 200)], 16, 0)
    with counted() as before:
        out = classes.run(step)
    assert device_counts.cache_info().currsize == 1
    shared_workspace(torch.device("cpu"))._buffer.fill_(0xFF)
    with counted() as after:
        assert torch.equal(classes.run(step), out)
    assert after.stats == before.stats
    assert before.stats.kept_blocks > 0
