"""Steps of sparse and dense requests, through a builder and an impl."""

from unittest import mock

import pytest
import torch
from hypothesis import given

from tests.support.engines import vllm_version
from tests.support.flash_attn_step import EXACT, HEADS, SPARSE, Classes, Step, assert_dense, modest, steps
from tests.support.request import Request
from tests.support.vllm_side import counted


@modest
@given(steps)
def test_alpha_0_is_dense_whatever_the_batch(calls, step):
    classes = Classes(EXACT, step.page_size)
    calls.clear()
    metadata = classes.build(step)
    plan = metadata.flashprefill.plan
    with counted() as count:
        out = classes.forward(step, metadata)
    assert_dense(step, out)
    assert len(calls) == (1 if len(plan.dense) else 0)
    assert count.stats.sparse_tokens == plan.num_sparse_tokens
    assert count.stats.kept_blocks == count.stats.visible_blocks == HEADS * plan.visible_blocks
    assert count.stats.dense_tokens == {reason.value: n for reason, n in plan.dense_tokens.items() if n}


@modest
@given(steps)
def test_each_request_gets_in_a_batch_what_it_gets_alone(calls, step):
    classes = Classes(SPARSE, step.page_size)
    with counted() as together:
        pieces = step.pieces(classes.run(step))
    with counted() as apart:
        for request, piece in zip(step.requests, pieces, strict=True):
            alone = Step([request], step.page_size, 0, step.heads_first)
            assert torch.equal(alone.pieces(classes.run(alone))[0], piece)
    assert together.stats == apart.stats


@modest
@given(steps)
def test_requests_without_tokens_pad_a_batch(calls, step):
    """As in the batches of full CUDA graphs."""
    classes = Classes(SPARSE, step.page_size)
    with counted() as plain:
        expected = classes.run(step)
    step.in_a_graph = True
    calls.clear()
    metadata = classes.build(step)
    plan = metadata.flashprefill.plan
    with counted() as padded:
        out = classes.forward(step, metadata)
    assert torch.equal(out[: step.num_tokens], expected[: step.num_tokens])
    assert padded.stats == plain.stats
    assert sorted([*plan.dense, *(request.index for request in plan.sparse)]) == list(range(len(step.requests)))
    assert len(calls) == (1 if len(plan.dense) else 0), "there is no part of padding alone"


def test_the_cases_prune(calls):
    with counted() as count:
        Classes(SPARSE).run(Step([Request(1, 400), Request(700, seed=3), Request(400, 256, 300)], 16, 2))
    assert count.stats.sparse_tokens == 1100
    assert 0.3 < count.stats.density < 0.95


def test_a_request_reads_pages_that_another_of_the_step_writes(calls):
    """A prefix hit on a prompt that is in the same step, by a sparse and by a dense request."""
    step = Step([Request(500), Request(600, 128), Request(1, 128)], 16, 0)
    first = step.parts[0]
    for row in (1, 2):
        _q, k, v = step.parts[row]
        k[:128], v[:128] = first[1][:128], first[2][:128]
        step.keys_and_values[:, step.block_table[row, :8].long()] = torch.nan
        step.block_table[row, :8] = step.block_table[0, :8]
    assert_dense(step, Classes(EXACT).run(step))


def test_a_step_with_no_sparse_request_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(1, 400), Request(200), Request(1, 5)], 16, 3)
    metadata = classes.build(step)
    before = dict(vars(metadata))
    calls.clear()
    query, key, value, output = inputs = step.inputs()
    with counted() as count:
        classes.forward(step, metadata, inputs)
    (call,) = calls
    assert call["query"] is query and call["key"] is key and call["value"] is value and call["output"] is output
    assert call["attn_metadata"] is metadata and vars(metadata) == before
    assert_dense(step, output)
    assert count.stats.dense_tokens == {"decode": 2, "short_prompt": 200}


@pytest.mark.parametrize("first", [0, 1])
def test_nothing_is_uploaded_for_dense_requests_that_lie_together(calls, first, monkeypatch):
    monkeypatch.setattr("vllm_flashprefill.backend.batch.upload", None)
    classes = Classes(EXACT)
    step = Step([*[Request(500)] * first, Request(1, 400), Request(200), Request(1, 30), Request(600)], 16, 2)
    common = step.common()
    with mock.patch.object(step, "common", lambda: common):
        metadata = classes.build(step)
    assert metadata.flashprefill.dense_rows == slice(500 * first, 500 * first + 202)
    assert metadata.flashprefill.dense_requests == slice(first, first + 3)
    dense_metadata = metadata.flashprefill.dense_metadata
    for part, whole in (
        (dense_metadata.block_table, common.block_table_tensor[first:]),
        (dense_metadata.slot_mapping, common.slot_mapping[500 * first :]),
        (dense_metadata.seq_lens, common.seq_lens[first:]),
    ):
        assert part.data_ptr() == whole.data_ptr()
    assert dense_metadata.query_start_loc.tolist() == [0, 1, 201, 202]
    assert_dense(step, classes.forward(step, metadata))


@pytest.mark.parametrize("together", [True, False])
def test_the_dense_requests_of_a_mixed_step_go_to_vllm_once(calls, together):
    classes = Classes(EXACT)
    requests = [Request(1, 400), Request(200), Request(600), Request(1, 30)]
    step = Step(requests[: 3 if together else 4], 16, 2)
    metadata = classes.build(step)
    dense_metadata = metadata.flashprefill.dense_metadata
    assert type(dense_metadata) is type(metadata) and not hasattr(dense_metadata, "flashprefill")
    assert isinstance(metadata.flashprefill.dense_rows, slice) == together
    calls.clear()
    assert_dense(step, classes.forward(step, metadata))
    (call,) = calls
    assert call["attn_metadata"] is dense_metadata
    assert len(call["query"]) == dense_metadata.num_actual_tokens == step.num_tokens - 600
    assert (call["key"] is None) == (vllm_version() != "0.10.0")
