"""CUDA graphs hold vLLM's own attention."""

import enum

import pytest
import torch

from tests.support.engines import vllm_version
from tests.support.flash_attn_step import EXACT, Classes, Step, assert_dense
from tests.support.request import Request
from tests.support.vllm_side import counted
from vllm_flashprefill import counters


def test_a_captured_batch_is_vllms_own_and_not_counted(calls):
    classes = Classes(EXACT)
    step = Step([Request(600), Request(1, 400)], 16, 0)
    metadata = classes.builder.build_for_cudagraph_capture(step.common())
    calls.clear()
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == counters.Stats()


def test_no_mixed_batch_is_a_full_graph(calls, monkeypatch):
    classes = Classes(EXACT)
    if vllm_version() == "0.10.0":
        decoding, mixed = Step([Request(1, 400)], 16, 0), Step([Request(1, 400), Request(600)], 16, 0)
        for step, expected in ((decoding, True), (mixed, False), (decoding, True)):
            classes.build(step)
            assert classes.builder.can_run_in_cudagraph(step.common()) is expected
        return
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    AttentionCGSupport = type(FlashAttentionMetadataBuilder._cudagraph_support)
    for own, expected in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_BATCH", "UNIFORM_BATCH"), ("NEVER", "NEVER")):
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport[own])
        support = type(classes.builder).get_cudagraph_support(classes.vllm_config, classes.builder.kv_cache_spec)
        assert support is AttentionCGSupport[expected]


@pytest.mark.skipif(vllm_version() != "0.10.0", reason="vLLM 0.10.1 to 0.11.0 have builders that say so")
def test_no_mixed_batch_is_a_full_graph_where_builders_say_so_themselves(calls, monkeypatch):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    levels = enum.Enum("Support", {"ALWAYS": 3, "UNIFORM_BATCH": 2, "UNIFORM_SINGLE_TOKEN_DECODE": 1, "NEVER": 0})
    for own, expected in (("ALWAYS", "UNIFORM_BATCH"), ("UNIFORM_SINGLE_TOKEN_DECODE",) * 2, ("NEVER", "NEVER")):
        monkeypatch.setattr(FlashAttentionMetadataBuilder, "cudagraph_support", levels[own], raising=False)
        assert Classes(EXACT).builder.cudagraph_support is levels[expected]


def test_the_dense_schedule_stays_out_of_the_buffer_that_graphs_read(calls, monkeypatch):
    from vllm.v1.attention.backends import flash_attn

    schedules = []

    def schedule(**arguments):
        schedules.append(arguments)
        return torch.full((3,), len(schedules), dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    classes = Classes(EXACT)
    classes.builder.aot_schedule = classes.builder.use_full_cuda_graph = True
    classes.builder.max_num_splits, classes.builder.max_cudagraph_size = 16, 512
    classes.builder.scheduler_metadata = torch.zeros(8, dtype=torch.int32)
    metadata = classes.build(Step([Request(1, 400), Request(600)], 16, 0))
    assert [arguments["batch_size"] for arguments in schedules] == [2, 1]
    assert classes.builder.scheduler_metadata.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert metadata.flashprefill.dense_metadata.scheduler_metadata.tolist() == [2, 2, 2]
    assert schedules[1]["num_splits"] == metadata.flashprefill.dense_metadata.max_num_splits == 0
    assert classes.builder.use_full_cuda_graph and classes.builder.max_num_splits == 16
