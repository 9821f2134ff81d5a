"""Batches that the builder leaves as vLLM made them, and builders that vLLM puts around ours."""

import pytest
import torch

from tests.support.attention import exact_attention
from tests.support.flash_attn_step import (
    DTYPE,
    EXACT,
    SCALE,
    Classes,
    Step,
    assert_dense,
    assert_not_planned,
    needs,
    new_cache,
    since_0_24,
)
from tests.support.request import Request
from tests.support.vllm_side import our_backend
from vllm_flashprefill.routing import DenseReason


def test_a_draft_models_batch_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.builder.build(0, step.common(), fast_build=True)
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


def test_a_batch_that_describes_no_requests_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(600)], 16, 0)
    metadata = classes.build(step, query_start_loc_cpu=torch.tensor([5, 0], dtype=torch.int32))
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@needs("causal")
def test_a_batch_that_is_not_causal_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(400)], 16, 0)
    out = assert_not_planned(classes, step, classes.build(step, causal=False), calls)
    for (q, k, v), got in zip(step.parts, step.pieces(out), strict=True):
        torch.testing.assert_close(got, exact_attention(q, k, v, SCALE, causal=False).to(DTYPE), rtol=2e-2, atol=1e-2)
    by_request = classes.build(step, causal=torch.tensor([True, False]))
    assert not hasattr(by_request, "flashprefill")


@needs("mm_req_doc_ranges")
@pytest.mark.parametrize("ranges", [{}, {0: [(100, 300)], 1: []}])
def test_a_batch_of_a_model_with_bidirectional_images_is_vllms_own(calls, ranges):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, mm_req_doc_ranges=ranges)
    # FlashAttention 2, of which this test makes believe, leaves the ranges out.
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@needs("dcp_local_seq_lens")
def test_a_context_parallel_batch_is_not_planned(calls):
    classes = Classes(EXACT)
    classes.builder.dcp_world_size = 2
    classes.builder._dcp_context_kv_lens = torch.full((8,), -1, dtype=torch.int32)
    metadata = classes.build(Step([Request(1, 400), Request(500, 100)], 16, 0))
    assert not hasattr(metadata, "flashprefill")
    assert metadata.dcp_context_kv_lens.tolist() == [200, 50], "the whole batch's stay in vLLM's buffer"
    classes.impl.dcp_world_size = 2
    assert classes.dense_reason(new_cache(4, 16)[0]) is DenseReason.CONTEXT_PARALLEL


@since_0_24
def test_static_sinks_are_vllms_own(calls):
    """vLLM's builder for them, made around ours, puts tokens before each request that the host does not count."""
    from vllm.model_executor.layers.attention.static_sink_attention import create_static_sink_attention_backend

    backend = create_static_sink_attention_backend(our_backend(), sink_len=128)
    classes = Classes(EXACT, builder_class=backend.get_builder_cls())
    metadata = classes.build(Step([Request(600)], 16, 0))
    assert metadata.seq_lens.tolist() == [728]
    assert not hasattr(metadata, "flashprefill")


@since_0_24
def test_local_attention_is_planned_by_its_own_lengths(calls):
    """vLLM's builder for it, made around ours, makes requests of chunks, and leaves the bound of the others."""
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    backend = create_chunked_local_attention_backend(our_backend(), 512)
    classes = Classes(EXACT, builder_class=backend.get_builder_cls())
    step = Step([Request(400, 600), Request(1, 700)], 16, 0)
    metadata = classes.build(step)
    (sparse,) = metadata.flashprefill.plan.sparse
    assert (sparse.context_len, sparse.query_len) == (88, 400)
    for (q, k, v), got in zip(step.parts, step.pieces(classes.forward(step, metadata)), strict=True):
        torch.testing.assert_close(got, exact_attention(q, k[512:], v[512:], SCALE).to(DTYPE), rtol=2e-2, atol=1e-2)
