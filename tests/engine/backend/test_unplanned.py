"""Batches that the builder leaves as vLLM made them, and builders that vLLM puts around ours."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.attention import exact_attention
from tests.support.engines import vllm_version
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
from tests.support.vllm_side import LAYER, counted, our_backend
from vllm_flashprefill import counters
from vllm_flashprefill.backend import builder as builder_module
from vllm_flashprefill.backend.attention_impl import in_draft_model
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
    by_request = classes.build(step, causal=torch.tensor([1, 0], dtype=torch.int32))
    assert not hasattr(by_request, "flashprefill")


@needs("mm_req_doc_ranges")
def test_a_batch_with_bidirectional_images_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, mm_req_doc_ranges={0: [(100, 300)], 1: []})
    # FlashAttention 2, of which this test makes believe, leaves the ranges out.
    assert_dense(step, assert_not_planned(classes, step, metadata, calls))


@needs("mm_req_doc_ranges")
@pytest.mark.parametrize("ranges", [{}, {0: [], 1: []}])
def test_a_text_batch_of_a_model_with_bidirectional_images_is_planned(calls, ranges):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.build(step, mm_req_doc_ranges=ranges)
    assert [request.index for request in metadata.flashprefill.plan.sparse] == [0]
    assert_dense(step, classes.forward(step, metadata))


@needs("rswa_prefix_lens")
def test_a_window_over_what_requests_generate_is_vllms_own(calls):
    """A part's metadata would write its prompts' lengths over those of the whole batch."""
    classes = Classes(EXACT)
    classes.builder.rswa_window = 64
    classes.builder.persistent_rswa_prefix_lens = torch.zeros(64, dtype=torch.int32)
    classes.builder.persistent_rswa_window_tensor = torch.tensor([64], dtype=torch.int32)
    step = Step([Request(600), Request(1, 899), Request(1, 499)], 16, 0)
    metadata = classes.build(step, rswa_prefix_lens=torch.tensor([600, 700, 40], dtype=torch.int32))
    assert metadata.rswa_prefix_lens.tolist() == [600, 700, 40]
    assert_not_planned(classes, step, metadata, calls)


def test_a_batch_of_which_something_unknown_is_said_is_vllms_own(calls, caplog, monkeypatch):
    """By request or not, a part of the batch would have it wrong, and attention may be another."""
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    known = type(step.common())
    newer = dataclasses.make_dataclass(
        "Newer", [("window_lens", object, None), ("is_new", bool, False)], bases=(known,)
    )
    monkeypatch.setattr(builder_module, "_named_fields", set())

    def common(**more):
        return newer(**{field.name: getattr(step.common(), field.name) for field in dataclasses.fields(known)}, **more)

    assert classes.builder.build(0, common()).flashprefill.plan.sparse
    for _ in range(2):
        metadata = classes.builder.build(0, common(window_lens=torch.tensor([600, 30])))
        calls.clear()
        with counted() as count:
            assert_dense(step, classes.forward(step, metadata))
        assert [call["attn_metadata"] for call in calls] == [metadata]
        assert count.stats == counters.Stats(dense_tokens={"unknown_batch": 601})
    warnings = [record.getMessage() for record in caplog.records if "window_lens" in record.getMessage()]
    assert warnings == [
        "FlashPrefill: batches in which vLLM sets window_lens stay dense, since it is not known what that means"
    ]


def test_vllm_tags_the_models_it_makes():
    if vllm_version() == "0.10.0":
        pytest.skip("its CPU build cannot import the module")
    from vllm.compilation import backends

    assert backends.model_tag == "backbone"
    with backends.set_model_tag("eagle_head"):
        assert in_draft_model()
    assert not in_draft_model()


def test_a_draft_models_layers_are_vllms_own(calls, monkeypatch):
    """Their batch may be described like any other; metadata of the target's layers may be altered between drafts."""
    backends = SimpleNamespace(model_tag="eagle_head")
    monkeypatch.setitem(sys.modules, "vllm.compilation.backends", backends)
    draft = Classes(EXACT)
    backends.model_tag = "backbone"
    target = Classes(EXACT)
    assert (draft.impl.is_draft, target.impl.is_draft) == (True, False)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    layers = target.vllm_config.compilation_config.static_forward_context
    monkeypatch.setitem(layers, LAYER, draft.layer)
    assert not hasattr(draft.build(step), "flashprefill")
    calls.clear()
    with counted() as count:
        assert_dense(step, draft.forward(step, target.build(step)))
    assert len(calls) == 1 and count.stats == counters.Stats(dense_tokens={"draft": 601})


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
    # A table as wide as vLLM's.
    metadata = classes.build(Step([Request(600)], 16, 0), block_table_tensor=torch.zeros(1, 512, dtype=torch.int32))
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
