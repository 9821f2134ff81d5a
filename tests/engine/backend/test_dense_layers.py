"""Layers and calls of the impl that are vLLM's own, whatever the step."""

import dataclasses
import functools

import pytest
import torch

from tests.support.e4m3 import take_e4m3_caches
from tests.support.engines import vllm_version
from tests.support.flash_attn_step import (
    DTYPE,
    EXACT,
    HEAD_SIZE,
    KV_HEADS,
    SPARSE,
    Classes,
    Step,
    assert_dense,
    new_cache,
)
from tests.support.request import Request
from tests.support.vllm_side import LAYER, counted, heads_before_tokens, our_backend
from vllm_flashprefill import counters
from vllm_flashprefill.backend import density_guard, layer_routing
from vllm_flashprefill.backend.batch import vllms_class
from vllm_flashprefill.kernels import sparse_attention as kernels
from vllm_flashprefill.routing import DenseReason


def test_a_profile_run_is_vllms_own(calls):
    classes = Classes(EXACT)
    step = Step([Request(600)], 16, 0)
    calls.clear()
    with counted() as count:
        classes.forward(step, None)
    assert len(calls) == 1
    assert count.stats == counters.Stats()


def test_a_quantised_output_is_refused_by_vllm(calls):
    classes = Classes(EXACT)
    step = Step([Request(600)], 16, 0)
    with pytest.raises(NotImplementedError, match="output quantization"):
        classes.forward(step, classes.build(step), output_scale=torch.ones(1))


def test_cascade_attention(calls, monkeypatch):
    from vllm.v1.attention.backends import flash_attn

    cascades = []
    monkeypatch.setattr(flash_attn, "cascade_attention", lambda *_, **named: cascades.append(named), raising=False)
    classes = Classes(EXACT)
    decoding = Step([Request(1, 400), Request(1, 300)], 16, 0)
    metadata = classes.build(decoding, common_prefix_len=256)
    if not hasattr(metadata, "use_cascade"):
        pytest.skip("this vLLM has no cascade attention")
    assert metadata.use_cascade
    classes.forward(decoding, metadata)
    assert len(cascades) == 1
    mixed = Step([Request(1, 400), Request(600, 300)], 16, 0)
    metadata = classes.build(mixed, common_prefix_len=256)
    assert metadata.use_cascade and not metadata.flashprefill.dense_metadata.use_cascade
    assert_dense(mixed, classes.forward(mixed, metadata))
    assert len(cascades) == 1


def test_layers_the_kernels_do_not_take_are_dense(calls):
    cache, _keys_and_values = new_cache(4, 16)

    def reshaped(page_size=16, head_size=HEAD_SIZE):
        if heads_before_tokens():
            return torch.zeros(4, KV_HEADS, page_size, 2 * head_size, dtype=DTYPE)
        # Keys and values are a dimension of their own.
        return torch.zeros(2, 4, page_size, KV_HEADS, head_size, dtype=DTYPE).movedim(0, cache.shape.index(2))

    classes = Classes(EXACT)
    assert classes.dense_reason(cache) is None
    assert classes.dense_reason(cache.float()) is DenseReason.DTYPE
    assert classes.dense_reason(reshaped(page_size=24)) is DenseReason.KV_CACHE_LAYOUT
    strided = torch.zeros(cache.shape[::-1], dtype=DTYPE).permute(*reversed(range(cache.dim())))
    assert classes.dense_reason(strided) is DenseReason.KV_CACHE_LAYOUT
    odd = Classes(EXACT, head_size=96)
    assert odd.dense_reason(reshaped(head_size=96)) is DenseReason.HEAD_SIZE
    assert not odd.impl.may_be_sparse
    assert Classes(EXACT, sliding_window=64).dense_reason(cache) is DenseReason.SLIDING_WINDOW


def test_nothing_is_planned_for_a_group_of_dense_layers(calls, monkeypatch):
    monkeypatch.setattr("vllm_flashprefill.backend.builder.plan_step", None)
    classes = Classes(SPARSE, sliding_window=64)
    step = Step([Request(1, 400), Request(600)], 16, 5)
    with counted() as count:
        classes.run(step)
    assert count.stats == counters.Stats(dense_tokens={"sliding_window": 601})


@pytest.mark.skipif(
    getattr(our_backend().get_builder_cls(), "supports_update_block_table", False),
    reason="other groups of layers get a builder's plan",
)
def test_nothing_is_planned_once_all_layers_are_seen_to_be_dense(calls, monkeypatch):
    classes = Classes(dataclasses.replace(SPARSE, num_dense_layers=2))
    step = Step([Request(1, 400), Request(600)], 16, 5)
    assert len(classes.build(step).flashprefill.plan.sparse) == 1, "its cache has not been seen"
    expected = classes.run(step)
    monkeypatch.setattr("vllm_flashprefill.backend.builder.plan_step", None)
    with counted() as count:
        assert torch.equal(classes.run(step)[: step.num_tokens], expected[: step.num_tokens])
    assert count.stats == counters.Stats(dense_tokens={"dense_layer": 601})


@pytest.mark.parametrize("first_is_dense", [True, False])
def test_a_group_with_a_sparse_layer_is_planned(calls, first_is_dense):
    classes, other = Classes(SPARSE), Classes(dataclasses.replace(SPARSE, num_dense_layers=2))
    impls = [other.impl, classes.impl] if first_is_dense else [classes.impl, other.impl]
    classes.builder._undecided = list(impls)
    step = Step([Request(1, 400), Request(600)], 16, 5)
    for _ in range(3):
        metadata = classes.build(step)
        assert len(metadata.flashprefill.plan.sparse) == 1
        for impl in impls:
            query, key, value, output = step.inputs()
            impl.forward(classes.layer, query, key, value, step.kv_cache, metadata, output=output)
    assert classes.builder._undecided == []


@pytest.mark.skipif(vllm_version() != "0.10.0", reason="this vLLM names a builder's layers")
def test_nothing_is_planned_for_layers_with_windows_beside_full_ones_that_are_not_named(calls, monkeypatch):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    full, windowed = Classes(SPARSE), Classes(SPARSE, sliding_window=64)
    layers = windowed.vllm_config.compilation_config.static_forward_context
    monkeypatch.setitem(layers, "model.layers.0.self_attn.attn", full.layer)
    monkeypatch.setitem(layers, LAYER, windowed.layer)
    shape = dict(block_size=16, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=DTYPE, use_mla=False)
    make = functools.partial(type(windowed.builder), vllm_config=windowed.vllm_config, device=torch.device("cpu"))
    windowed.builder = make(SlidingWindowSpec(**shape, sliding_window=64))
    assert list(windowed.builder.own_layers()) == [windowed.layer]
    full.builder = make(FullAttentionSpec(**shape))
    full.set_config(SPARSE)
    step = Step([Request(1, 400), Request(600)], 16, 5)
    assert len(full.build(step).flashprefill.plan.sparse) == 1
    monkeypatch.setattr("vllm_flashprefill.backend.builder.plan_step", None)
    assert not hasattr(windowed.build(step), "flashprefill")


@pytest.mark.parametrize("name", ["_q_scale", "_k_scale", "_v_scale"])
def test_an_e4m3_cache_with_other_scales_is_dense(calls, monkeypatch, caplog, name):
    take_e4m3_caches(monkeypatch)
    cache = new_cache(4, 16)[0].to(torch.uint8)
    classes = Classes(EXACT, kv_cache_dtype="fp8")
    assert classes.dense_reason(cache) is None
    assert classes.dense_reason(cache.bfloat16()) is DenseReason.DTYPE
    for scale in (torch.ones(KV_HEADS), torch.ones(1, 1)):
        setattr(classes.layer, name, scale)
        assert classes.dense_reason(cache) is None
    for scale in (torch.ones(KV_HEADS, 16), torch.ones(KV_HEADS + 1), torch.ones((), dtype=torch.bfloat16)):
        setattr(classes.layer, name, scale)
        assert classes.dense_reason(cache) is DenseReason.QUANTIZED_KV_CACHE
        assert f"layers with a {name[1:]} of shape {tuple(scale.shape)} in {scale.dtype} stay dense" in caplog.text


def test_products_in_e4m3_that_cannot_be_are_an_error_when_layers_are_made(calls, monkeypatch):
    take_e4m3_caches(monkeypatch)
    monkeypatch.setenv("FLASHPREFILL_COMPUTE_DTYPE", "fp8")
    for capability, cache, says in (
        (None, "fp8", "is for Hopper GPUs .* there is no GPU"),
        ((8, 0), "fp8", r"is for Hopper GPUs .* this one has 8\.0"),
        ((9, 0), "auto", "is for KV caches in e4m3; ask vLLM for --kv-cache-dtype fp8"),
    ):
        monkeypatch.setattr(layer_routing, "gpu_capability", lambda capability=capability: capability)
        with pytest.raises(ValueError, match=f'^flashprefill: compute_dtype "fp8" {says}'):
            Classes(EXACT, kv_cache_dtype=cache)
        assert not Classes(EXACT, kv_cache_dtype=cache, sliding_window=64).impl.may_be_sparse
    if kernels.hopper_fp8 is None:
        with pytest.raises(ValueError, match=r'^flashprefill: compute_dtype "fp8" needs a Triton with Gluon'):
            Classes(EXACT, kv_cache_dtype="fp8")
    else:
        Classes(EXACT, kv_cache_dtype="fp8")


def test_a_dense_layer_takes_a_mixed_step_whole(calls):
    classes = Classes(dataclasses.replace(EXACT, num_dense_layers=2))
    step = Step([Request(1, 400), Request(600)], 16, 5)
    metadata = classes.build(step)
    calls.clear()
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == counters.Stats(dense_tokens={"dense_layer": 601})


def test_a_layer_that_was_too_dense_takes_a_mixed_step_whole_for_a_while(calls, monkeypatch):
    monkeypatch.setattr(density_guard, "MIN_VISIBLE_BLOCKS", 1)
    monkeypatch.setattr(density_guard, "DENSE_STEPS", 1)
    classes = Classes(dataclasses.replace(SPARSE, max_density=0.0))
    step = Step([Request(1, 400), Request(600)], 16, 5)
    sparse = counters.Stats(sparse_tokens=600, dense_tokens={"decode": 1})
    dense = counters.Stats(dense_tokens={"density": 600, "decode": 1})
    for expected in (sparse, dense, sparse):
        metadata = classes.build(step)
        calls.clear()
        with counted() as count:
            out = classes.forward(step, metadata)
        assert (count.stats.sparse_tokens, count.stats.dense_tokens) == (expected.sparse_tokens, expected.dense_tokens)
        (call,) = calls
        assert (call["attn_metadata"] is metadata) == (expected is dense)
        if expected is dense:
            assert_dense(step, out)


def test_a_cache_of_another_dtype_than_the_queries_is_dense(calls):
    """vLLM 0.27 and newer may be asked for one."""
    classes = Classes(EXACT)
    step = Step([Request(600)], 16, 0)
    metadata = classes.build(step)
    query, key, value, output = step.inputs()
    with counted() as count:
        classes.impl.forward(
            classes.layer, query.half(), key, value, step.kv_cache, attn_metadata=metadata, output=output
        )
    assert count.stats == counters.Stats(dense_tokens={"dtype": 600})


@pytest.mark.parametrize("strict", [False, True])
def test_a_cache_of_another_shape_than_was_expected_is_dense(calls, monkeypatch, caplog, strict):
    """An engine that has started does not die at its first request, unless it is to."""
    monkeypatch.setenv("FLASHPREFILL_STRICT", str(int(strict)))
    classes = Classes(EXACT)
    step = Step([Request(600)], 16, 0)
    metadata = classes.build(step)

    def unlike(_):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(classes.impl, "paged_kv", unlike)
    if strict:
        with pytest.raises(ValueError, match="not enough values"):
            classes.forward(step, metadata)
        return
    with counted() as count:
        assert_dense(step, classes.forward(step, metadata))
    assert count.stats == counters.Stats(dense_tokens={"self_check": 600})
    assert f"a layer stays dense, since its cache is {tuple(step.kv_cache.shape)}" in caplog.text


def test_a_cache_of_other_heads_is_dense(calls, monkeypatch):
    classes = Classes(EXACT, num_heads=8, num_kv_heads=4)
    step = Step([Request(600)], 16, 0)
    query, key, value, output = (x.repeat(1, 2, 1) for x in step.inputs())
    monkeypatch.setattr(vllms_class(type(classes.impl)), "forward", lambda *args, **named: output)
    with counted() as count:
        classes.impl.forward(
            classes.layer, query, key, value, step.kv_cache, attn_metadata=classes.build(step), output=output
        )
    assert count.stats == counters.Stats(dense_tokens={"kv_cache_layout": 600})
