"""Lengths of sequences and prompts, as each model runner says them."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.utils import CommonAttentionMetadata

import vllm_flashprefill
from tests.support.flash_attn_step import (
    EXACT,
    SPARSE,
    Classes,
    Step,
    assert_dense,
    assert_not_planned,
    needs,
    since_0_24,
)
from tests.support.request import Request
from vllm_flashprefill.backend import prompt_lengths
from vllm_flashprefill.routing import DenseReason


@needs("seq_lens_cpu_upper_bound")
@pytest.mark.parametrize("together", [True, False])
def test_lengths_that_are_only_a_bound(calls, monkeypatch, together):
    """Some drafted tokens were not accepted, which only the device knows: nobody waits for it."""

    def wait(self):
        pytest.fail("the lengths were copied from the device")

    # Not in vLLM 0.30.0 and newer.
    monkeypatch.setattr(CommonAttentionMetadata, "seq_lens_cpu", property(wait), raising=False)
    monkeypatch.setattr(CommonAttentionMetadata, "num_computed_tokens_cpu", property(wait), raising=False)
    requests = [Request(4, 400), Request(3, 500), Request(500, 200, 100), Request(4, 280)]
    step = Step(requests[: 3 if together else 4], 16, 0)
    exact = np.array([r.seq_len for r in step.requests], dtype=np.int32)
    drafted = np.array([3, 2, 0, 3][: len(exact)], dtype=np.int32)
    classes = Classes(EXACT)
    metadata = classes.build(
        step,
        drafted=drafted,
        _seq_lens_cpu=None,
        _num_computed_tokens_cpu=None,
        seq_lens_cpu_upper_bound=torch.from_numpy(exact + drafted),
    )
    plan = metadata.flashprefill.plan
    assert [(r.index, r.context_len, r.prompt_len) for r in plan.sparse] == [(2, 200, 800)]
    assert plan.dense_tokens == {DenseReason.DECODE: step.num_tokens - 500}
    assert metadata.flashprefill.dense_metadata.max_seq_len == 505
    assert_dense(step, classes.forward(step, metadata))


@needs("seq_lens_cpu_upper_bound")
def test_a_batch_whose_lengths_only_the_device_knows_is_vllms_own(calls, monkeypatch):
    """A draft model's, in vLLM's second model runner."""
    monkeypatch.setattr(
        CommonAttentionMetadata,
        "seq_lens_cpu",
        property(lambda self: pytest.fail("copied from the device")),
        raising=False,
    )
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, _seq_lens_cpu=None, _num_computed_tokens_cpu=None, seq_lens_cpu_upper_bound=None)
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@since_0_24
def test_lengths_from_the_second_model_runner(calls, monkeypatch):
    """Its batch has no exact lengths on the host, and requests without tokens in full CUDA graphs."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    class Runner(GPUModelRunner):
        def __init__(self):
            pass

        def prepare_inputs(self, **known):
            return InputBatch(**{field.name: known.get(field.name) for field in dataclasses.fields(InputBatch)})

    assert inspect.signature(GPUModelRunner.prepare_inputs).return_annotation is InputBatch
    step = Step([Request(1, 400), Request(500, 200, 300)], 16, 2, in_a_graph=True)
    common = step.common(_seq_lens_cpu=None, _num_computed_tokens_cpu=None)
    classes = Classes(SPARSE)
    prompt_lengths.watch(Runner, prompt_lengths.PREPARED_INPUTS)
    try:
        Runner().prepare_inputs(
            num_computed_tokens_np=np.array([400, 200]),
            num_scheduled_tokens=np.array([1, 500]),
            prefill_len_np=np.array([300, 1000]),
        )
        metadata = classes.builder.build(0, common)
    finally:
        prompt_lengths.unwatch(Runner, prompt_lengths.PREPARED_INPUTS)
    (sparse,) = metadata.flashprefill.plan.sparse
    assert (sparse.index, sparse.context_len, sparse.query_len, sparse.prompt_len) == (1, 200, 500, 1000)
    assert metadata.flashprefill.plan.dense_tokens == {DenseReason.DECODE: 1}


def test_micro_batches_know_where_their_prompts_end(calls, monkeypatch):
    """vLLM's own halves of a step; a request that lies in both is cut where the first half ends."""
    ubatch_utils = pytest.importorskip("vllm.v1.worker.ubatch_utils", reason="this vLLM has no micro-batches")
    from vllm.v1.worker.gpu_model_runner import split_attn_metadata

    step = Step([Request(1, 400), Request(500, 200, 300), Request(600, 0, 400)], 16, 0)
    classes = Classes(SPARSE)
    lengths = np.array([400, 200, 0]), np.array([1, 500, 600]), np.array([401, 1000, 1000])
    monkeypatch.setattr(prompt_lengths, "_watched", lengths)
    halves = [
        ubatch_utils.UBatchSlice(slice(0, 2), slice(0, 301)),
        ubatch_utils.UBatchSlice(slice(1, 3), slice(301, 1101)),
    ]
    plans = [classes.builder.build(0, half).flashprefill.plan for half in split_attn_metadata(halves, step.common())]
    found = [[(r.index, r.context_len, r.query_len, r.prompt_len) for r in plan.sparse] for plan in plans]
    assert found == [[(1, 200, 300, 1000)], [(0, 500, 200, 1000), (1, 0, 600, 1000)]]
    assert [plan.dense_tokens for plan in plans] == [{DenseReason.DECODE: 1}, {}]


@since_0_24
def test_both_model_runners_are_watched_until_the_backend_is_reverted(calls):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    def watched():
        return [
            hasattr(method, "_flashprefill_original") for method in (First._may_reorder_batch, Second.prepare_inputs)
        ]

    vllm_flashprefill.register()
    Classes(EXACT)
    assert watched() == [True, True]
    vllm_flashprefill.revert()
    assert watched() == [False, False]
