import re
from types import SimpleNamespace

import pytest
import torch

from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.backend import layer_routing
from vllm_flashprefill.backend.layer_routing import (
    check_layer_names,
    layer_config,
    layer_dense_reason,
    layer_index,
    say_quantised_cache,
)
from vllm_flashprefill.routing import DenseReason

CONFIG = FlashPrefillConfig(min_sparse_tokens=1024)


def impl(**attributes):
    plain = dict(
        attn_type="decoder",
        sliding_window=(-1, -1),
        logits_soft_cap=0,
        alibi_slopes=None,
        sinks=None,
        kv_sharing_target_layer_name=None,
        kv_cache_dtype="auto",
        num_heads=4,
    )
    return SimpleNamespace(**{**plain, **attributes})


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"logits_soft_cap": None}, None),
        ({"attn_type": "encoder_only"}, DenseReason.ENCODER),
        ({"attn_type": "encoder"}, DenseReason.ENCODER),
        ({"attn_type": SimpleNamespace(value="encoder_decoder")}, DenseReason.CROSS_ATTENTION),
        ({"sliding_window": (511, 0)}, DenseReason.SLIDING_WINDOW),
        ({"sliding_window": 512}, DenseReason.SLIDING_WINDOW),
        ({"logits_soft_cap": 50.0}, DenseReason.SOFTCAP),
        ({"alibi_slopes": [0.5]}, DenseReason.ALIBI),
        ({"sinks": torch.zeros(4)}, None),
        ({"sinks": torch.zeros(4, dtype=torch.bfloat16)}, None),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, DenseReason.SINKS),
        ({"sinks": torch.zeros(8)}, DenseReason.SINKS),
        ({"sinks": [0.0]}, DenseReason.SINKS),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, DenseReason.KV_SHARING),
        ({"kv_cache_dtype": "fp8"}, DenseReason.QUANTIZED_KV_CACHE),
        ({"kv_cache_dtype": "fp8", "takes_e4m3": True}, None),
        ({"kv_cache_dtype": "fp8_e4m3", "takes_e4m3": True}, None),
        *(
            ({"kv_cache_dtype": dtype, "takes_e4m3": True}, DenseReason.QUANTIZED_KV_CACHE)
            for dtype in ("fp8_e5m2", "fp8_inc", "fp8_per_token_head", "int8_per_token_head", "nvfp4")
        ),
        ({"dcp_world_size": 2}, DenseReason.CONTEXT_PARALLEL),
        ({"pcp_world_size": 2}, DenseReason.CONTEXT_PARALLEL),
        ({"batch_invariant_enabled": True}, DenseReason.BATCH_INVARIANT),
    ],
)
def test_route_of_a_layer(attributes, reason):
    assert layer_dense_reason(impl(**attributes), "model.layers.3.self_attn.attn", CONFIG) == reason


FP8 = FlashPrefillConfig(compute_dtype="fp8")


def config_of(capability, monkeypatch, engine_cache="fp8", **attributes):
    monkeypatch.setattr(layer_routing, "gpu_capability", lambda: capability)
    defaults = dict(head_size=128, is_draft=False, takes_e4m3=True, kv_cache_dtype=engine_cache)
    return layer_config(impl(**defaults | attributes), FP8, SimpleNamespace(cache_dtype=engine_cache))


@pytest.mark.parametrize(
    ("capability", "attributes", "says"),
    [
        (None, {}, 'for Hopper GPUs (compute capability 9.0), and there is no GPU; leave it at "auto"'),
        ((8, 0), {}, 'for Hopper GPUs (compute capability 9.0), and this one has 8.0; leave it at "auto"'),
        ((10, 0), {}, "and this one has 10.0"),
        ((9, 0), {"engine_cache": "auto"}, "for KV caches in e4m3; ask vLLM for --kv-cache-dtype fp8, or leave it at"),
        ((9, 0), {"engine_cache": "bfloat16"}, "for KV caches in e4m3; ask"),
        ((9, 0), {"engine_cache": "fp8_e5m2"}, "for KV caches in e4m3; ask"),
        ((9, 0), {"head_size": 256}, 'for heads of 64 or 128, not of 256; leave it at "auto"'),
    ],
)
def test_products_in_e4m3_that_cannot_be_are_an_error_when_a_layer_is_made(capability, attributes, says, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        config_of(capability, monkeypatch, **attributes)
    assert str(error.value).startswith('flashprefill: compute_dtype "fp8" is for ')


def test_products_in_e4m3_without_gluon_are_an_error_when_a_layer_is_made(monkeypatch):
    kernels = pytest.importorskip("vllm_flashprefill.kernels.sparse_attention")
    monkeypatch.setattr(kernels, "hopper_fp8", None)
    with pytest.raises(ValueError, match="needs a Triton with Gluon as the kernel knows it"):
        config_of((9, 0), monkeypatch)


@pytest.mark.parametrize(
    "attributes",
    [{"sliding_window": 512}, {"is_draft": True}, {"head_size": 96}, {"attn_type": "encoder"}, {"alibi_slopes": [1.0]}],
)
def test_layers_that_are_dense_anyway_take_any_compute_dtype(attributes, monkeypatch):
    assert config_of((8, 0), monkeypatch, engine_cache="auto", **attributes) is FP8


def test_a_layer_left_in_16_bits_has_its_products_in_16_bits(monkeypatch):
    assert config_of((9, 0), monkeypatch) is FP8
    assert config_of((9, 0), monkeypatch, kv_cache_dtype="auto") == FlashPrefillConfig()
    cache = SimpleNamespace(cache_dtype="fp8")
    assert layer_config(impl(head_size=256, is_draft=False), CONFIG, cache) is CONFIG


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(layer_routing.logger, "warning", lambda text, *values: lines.append(text % values))
    layer_routing._warn_cache.cache_clear()
    return lines


@pytest.mark.parametrize("dtype", ["fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "nvfp4"])
def test_a_cache_that_some_layers_have_and_is_not_read_is_named_once(dtype, said):
    cache = SimpleNamespace(cache_dtype=dtype, kv_cache_dtype_skip_layers=["3"])
    for _ in range(2):
        say_quantised_cache(impl(kv_cache_dtype=dtype, takes_e4m3=True), cache)
    say_quantised_cache(impl(takes_e4m3=True), cache)
    assert said == [
        f"FlashPrefill: layers with a KV cache in {dtype} stay dense: what is read is 16 bits, or e4m3 with one scale, "
        "or one for each KV head"
    ]


def test_on_a_cpu_e4m3_is_not_read_either(said):
    say_quantised_cache(impl(kv_cache_dtype="fp8"), SimpleNamespace(cache_dtype="auto"))
    (line,) = said
    assert line.endswith("layers with a KV cache in fp8 stay dense: what is read is 16 or 32 bits, on a CPU")


def test_a_cache_that_makes_the_engine_dense_is_said_of_the_engine_alone(said):
    cache = SimpleNamespace(cache_dtype="nvfp4", kv_cache_dtype_skip_layers=[])
    say_quantised_cache(impl(kv_cache_dtype="nvfp4", takes_e4m3=True), cache)
    say_quantised_cache(impl(kv_cache_dtype="nvfp4", takes_e4m3=True, sliding_window=512), SimpleNamespace())
    say_quantised_cache(impl(kv_cache_dtype="fp8", takes_e4m3=True), SimpleNamespace(cache_dtype="auto"))
    assert said == []


def test_first_layers_can_be_dense():
    config = FlashPrefillConfig(num_dense_layers=2)
    reasons = [layer_dense_reason(impl(), f"model.layers.{i}.self_attn.attn", config) for i in range(4)]
    assert reasons == [DenseReason.DENSE_LAYER, DenseReason.DENSE_LAYER, None, None]


def test_layers_without_an_index_are_an_error_before_any_step():
    named = {
        "model.layers.3.self_attn.attn": SimpleNamespace(impl=impl(flashprefill_config=CONFIG)),
        "model.attn": SimpleNamespace(impl=impl(flashprefill_config=CONFIG, sliding_window=512)),
        "visual.attn": SimpleNamespace(impl=impl()),
        "mamba": SimpleNamespace(),
    }
    check_layer_names(named, FlashPrefillConfig(num_dense_layers=2))
    named["model.attn"].impl.sliding_window = None
    check_layer_names(named, FlashPrefillConfig())
    with pytest.raises(ValueError, match=r"'model\.attn' has no layer index in its name, which num_dense_layers needs"):
        check_layer_names(named, FlashPrefillConfig(num_dense_layers=2))


def test_layer_index():
    assert layer_index("language_model.model.layers.12.self_attn.attn") == 12
    assert layer_index("transformer.h.0.attn") == 0
    with pytest.raises(ValueError, match="no layer index"):
        layer_index("model.attn")
