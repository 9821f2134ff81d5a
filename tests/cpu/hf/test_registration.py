"""Names, options and what is left of transformers."""

import sys

import pytest

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

import transformers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    SiglipConfig,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import generic

from tests.support.hf_models import SHAPE, make_model
from vllm_flashprefill import PRESETS, FlashPrefillConfig, hf
from vllm_flashprefill.config import PRESETS_BY_HEAD_SIZE


def test_no_config_has_a_name_with_flash_in_it():
    early = LlamaConfig(**SHAPE, attn_implementation="flashprefill")
    hf.register()
    models = [
        LlamaForCausalLM(early),
        LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="flashprefill")),
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="flashprefill"),
        make_model("flashprefill"),
        make_model({"": "flashprefill"}),
        make_model(hf.CONFIG_NAME),
    ]
    for model in models:
        assert model.config._attn_implementation == model.model.config._attn_implementation == hf.CONFIG_NAME
    vision_and_text = SiglipConfig()
    vision_and_text._attn_implementation = {"text_config": "flashprefill", "vision_config": "sdpa"}
    assert vision_and_text.text_config._attn_implementation == hf.CONFIG_NAME
    assert vision_and_text.vision_config._attn_implementation == "sdpa"
    assert "flash" not in hf.CONFIG_NAME


@pytest.mark.parametrize("name", ["flashprefill", hf.CONFIG_NAME])
def test_a_config_that_refuses_flash_attention_takes_our_names(name):
    config_class = getattr(transformers, "HrmTextConfig", None)
    if config_class is None:
        pytest.skip("this transformers has no HRM")
    hf.register()
    config = config_class(attn_implementation=name)
    assert config.prefix_lm and not generic.is_flash_attention_requested(config)
    with pytest.raises(ValueError, match="FlashAttention"):
        config_class(attn_implementation="flash_attention_2")


def test_each_source_of_options_wins_over_the_next(monkeypatch):
    hf.register()
    assert hf.attention.layer_config("llama", 128) == FlashPrefillConfig()
    assert hf.attention.layer_config("llama", 64).alpha == PRESETS_BY_HEAD_SIZE[64]["llama"]["alpha"]
    assert hf.attention.layer_config("llama", 96) == FlashPrefillConfig()
    hf.unregister()
    hf.register(piece_size=0)
    assert hf.attention.layer_config("llama", 128).alpha == PRESETS["llama"]["alpha"]
    assert hf.attention.layer_config("qwen2_5_vl_text", 128).alpha == PRESETS["qwen2_5_vl"]["alpha"]
    hf.unregister()
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf.attention.layer_config("llama", 128).alpha == 0.3
    hf.unregister()
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "0.2")
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf.attention.layer_config("llama", 128) == FlashPrefillConfig(alpha=0.2, num_sink_blocks=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a number in"),
        ({"alhpa": 0.1}, "unknown option 'alhpa'; did you mean alpha?"),
        ({"num_window_blocks": 0}, "num_window_blocks must be an integer in [1, "),
        ({"compute_dtype": "fp8"}, 'compute_dtype is for KV caches in e4m3, as vLLM has them; leave it at "auto"'),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    with pytest.raises(ValueError) as error:
        hf.register(**options)
    assert message in str(error.value)
    assert "flashprefill" not in AttentionInterface().valid_keys()


def test_bad_variables_are_one_clear_error(monkeypatch):
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "much")
    with pytest.raises(ValueError, match="FLASHPREFILL_ALPHA must be a number"):
        hf.register()


def test_registering_twice():
    hf.register(alpha=0.1)
    hf.register(alpha=0.1)
    with pytest.raises(RuntimeError, match=r"already registered .* \{'alpha': 0.1\}; call .*unregister\(\)"):
        hf.register(alpha=0.2)
    hf.unregister()
    hf.unregister()
    hf.register(alpha=0.2)


def test_unregister_leaves_transformers_as_it_was():
    def state():
        check = getattr(generic, "is_flash_attention_requested", None)
        return (
            sorted(AttentionInterface()),
            sorted(AttentionMaskInterface()),
            check,
            PretrainedConfig._attn_implementation,
        )

    before = state()
    hf.register()
    for name in ("flashprefill", hf.CONFIG_NAME):
        assert name in AttentionInterface() and name in AttentionMaskInterface()
        if before[2] is not None:
            assert not generic.is_flash_attention_requested(requested_attention_implementation=name)
            assert generic.is_flash_attention_requested(requested_attention_implementation="flash_attention_2")
    hf.unregister()
    assert state() == before
    with pytest.raises(ValueError, match="not supported"):
        make_model("flashprefill")


@pytest.mark.parametrize("owner", [PretrainedConfig, generic])
def test_a_transformers_without_what_is_replaced_is_one_clear_error(owner, monkeypatch):
    name = "_attn_implementation" if owner is PretrainedConfig else "is_flash_attention_requested"
    if not hasattr(owner, name):
        pytest.skip("transformers 4 has no such function and needs none")
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"transformers [\d.]+ has no \S+\.{name} for flashprefill to extend"):
        hf.register()
    assert "flashprefill" not in AttentionInterface()


def test_transformers_missing_or_too_old_is_one_clear_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.55.0")
        with pytest.raises(RuntimeError, match=r"needs transformers 4\.56 or newer, not 4\.55\.0"):
            hf.register()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(RuntimeError, match=r"needs transformers 4\.56 or newer, which cannot be imported"):
            hf.register()
    hf.register()
