"""Engines that can prune nothing, and what their warning says to change."""

from types import SimpleNamespace

import pytest
import torch

from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.backend.engine_routing import check_compute_dtype, engine_dense_reason

LAYERS = 4


def model(**changes):
    hf = {"num_hidden_layers": LAYERS, "model_type": "llama", **changes.pop("hf", {})}
    head_size = changes.pop("head_size", 128)
    plain = dict(
        use_mla=False,
        attn_type="decoder",
        max_model_len=32768,
        runner_type="generate",
        dtype=torch.bfloat16,
        hf_text_config=SimpleNamespace(**hf),
        get_head_size=lambda: head_size,
    )
    return SimpleNamespace(**{**plain, **changes})


def engine(cache=None, parallel=None, **changes):
    return SimpleNamespace(
        model_config=model(**changes),
        cache_config=SimpleNamespace(**{"cache_dtype": "auto", "sliding_window": None, **(cache or {})}),
        parallel_config=SimpleNamespace(**(parallel or {})),
    )


def reason(backend=None, capability=(9, 0), options=None, **changes):
    return engine_dense_reason(engine(**changes), FlashPrefillConfig(**(options or {})), backend, capability)


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "FLASH_ATTN_VLLM_V1", "CUSTOM", "CPU_ATTN"])
def test_a_decoder_on_our_backends_can_be_sparse(backend):
    assert reason(backend) is None
    older = SimpleNamespace(model_config=SimpleNamespace())
    assert engine_dense_reason(older, FlashPrefillConfig(), backend, None) is None, "older versions say less of a model"


GEMMA = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 512}


@pytest.mark.parametrize(
    "engine",
    [
        {"backend": "FLASH_ATTN", "capability": (10, 0)},
        {"cache": {"cache_dtype": "bfloat16", "block_size": 48}},
        {"cache": {"cache_dtype": "fp8"}},
        {"cache": {"cache_dtype": "fp8_e4m3"}},
        {"hf": {"model_type": "gpt_oss"}},
        {"hf": {"model_type": "gpt_oss"}, "capability": None},
        {"cache": {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}},
        {"hf": GEMMA},
        {"hf": {**GEMMA, "layer_types": ["sliding_attention"] * LAYERS, "sliding_window": None}},
        {"options": {"num_dense_layers": LAYERS - 1}},
        {"hf": GEMMA, "options": {"num_dense_layers": LAYERS - 1}},
        {"max_model_len": 4097},
        {"max_model_len": 4096, "runner_type": "pooling"},
        {"head_size": 96, "dtype": torch.float32, "capability": None},
        {"parallel": {"decode_context_parallel_size": 1}},
        {"hf": {"attn_logit_softcapping": None, "alibi": False}},
        {"hf": {"num_hidden_layers": None}},
    ],
    ids=str,
)
def test_where_something_can_be_pruned_there_is_no_warning(engine):
    assert reason(**engine) is None


@pytest.mark.parametrize(
    "engine, says",
    [
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder_only", "capability": None}, "no causal attention"),
        ({"backend": "FLASHINFER"}, "FLASHINFER was asked for; ask for FLASH_ATTN"),
        ({"capability": (10, 0)}, "prefers FlashInfer on this GPU; ask for FLASH_ATTN"),
        *(
            (
                {"hf": {"model_type": "gpt_oss"}, "capability": capability},
                "attention sinks, which vLLM's FlashAttention",
            )
            for capability in ((8, 0), (8, 9), (12, 0))
        ),
        (
            {"cache": {"cache_dtype": "fp8_e5m2"}},
            "cache is fp8_e5m2; ask for --kv-cache-dtype bfloat16, float16 or fp8",
        ),
        ({"cache": {"cache_dtype": "nvfp4"}}, "the KV cache is nvfp4; ask for"),
        ({"cache": {"cache_dtype": "fp8_per_token_head"}}, "the KV cache is fp8_per_token_head; ask for"),
        ({"cache": {"cache_dtype": "fp8_per_token_head"}}, "or fp8, which is e4m3 with one scale, or one for each KV"),
        ({"cache": {"cache_dtype": "int8_per_token_head"}}, "the KV cache is int8_per_token_head; ask for"),
        (
            {"cache": {"cache_dtype": "fp8"}, "capability": (8, 9)},
            "the KV cache is fp8, which is sparse on Hopper GPUs; ask for --kv-cache-dtype bfloat16",
        ),
        ({"cache": {"cache_dtype": "fp8_e4m3"}, "capability": None}, "the KV cache is fp8_e4m3, which is sparse on"),
        (
            {"cache": {"block_size": 24}},
            "pages of the KV cache are of 24 tokens; ask for a --block-size that 16 divides",
        ),
        ({"parallel": {"decode_context_parallel_size": 2}}, "leave out --decode-context-parallel-size"),
        ({"dtype": torch.float32}, "ask for --dtype bfloat16"),
        ({"head_size": 96}, "heads of 64, 128, 256, and this model's are of 96"),
        ({"hf": {"attn_logit_softcapping": 50.0}}, "caps its logits"),
        ({"hf": {"model_type": "bloom"}}, "ALiBi"),
        (
            {"hf": {"layer_types": GEMMA["layer_types"][:1] * LAYERS, "interleaved_sliding_window": 512}},
            "sliding_attention",
        ),
        ({"cache": {"sliding_window": 4096}}, "a sliding window of 4096 tokens; --disable-sliding-window"),
        ({"hf": {"layer_types": ["linear_attention"] * LAYERS}}, "every layer is of linear_attention"),
        ({"options": {"num_dense_layers": LAYERS}}, "num_dense_layers is 4; at most 3 leaves a layer to prune"),
        (
            {"hf": {**GEMMA, "layer_types": GEMMA["layer_types"][::-1]}, "options": {"num_dense_layers": 1}},
            "num_dense_layers is 1; at most 0 leaves a layer to prune",
        ),
        ({"max_model_len": 4096}, "under 4096 tokens are dense, and sequences have at most 4096; lower min_sparse"),
        (
            {"max_model_len": 1024, "options": {"min_sparse_tokens": 0}},
            "every block of a prompt of 1023 tokens is kept, and sequences have at most 1024; lower num_sink_blocks",
        ),
        ({"options": {"num_dense_tail_blocks": 300}}, "every block of a prompt of 32767 tokens is kept"),
        ({"options": {"alpha": 0.0}}, "alpha is 0, which keeps every block; raise it"),
    ],
    ids=str,
)
def test_what_leaves_nothing_to_prune_is_said_with_what_to_change(engine, says):
    assert says in reason(**engine)


class PerLayerConfig:
    """Says what it is asked by layer, and raises where it is asked for the model."""

    def __getattribute__(self, name):
        raise ValueError("ask for a layer's")


def test_a_config_that_is_not_understood_is_no_reason():
    assert reason(hf_text_config=PerLayerConfig()) is None
    assert reason(hf_text_config=None) is None


def test_what_does_not_depend_on_the_batch_cannot_be_pruned(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "unset VLLM_BATCH_INVARIANT" in reason()


FP8 = {"cache_dtype": "fp8"}


@pytest.mark.parametrize(
    "capability, changes, says",
    [
        (None, {"cache": FP8}, "is for Hopper GPUs (compute capability 9.0), and there is no GPU; leave it at"),
        ((8, 0), {"cache": FP8}, "this one has 8.0"),
        ((8, 9), {}, "this one has 8.9"),
        ((10, 0), {"cache": FP8}, "this one has 10.0"),
        ((9, 0), {}, "is for KV caches in e4m3; ask vLLM for --kv-cache-dtype fp8, or leave it at"),
        ((9, 0), {"cache": {"cache_dtype": "bfloat16"}, "quantization": "fp8"}, "is for KV caches in e4m3"),
        ((9, 0), {"cache": {"cache_dtype": "fp8_e5m2"}}, "is for KV caches in e4m3"),
        ((9, 0), {"cache": FP8, "head_size": 256}, "is for heads of 64 or 128, not of 256"),
    ],
)
def test_products_in_e4m3_that_cannot_be_are_an_error_when_an_engine_is_configured(capability, changes, says):
    with pytest.raises(ValueError) as error:
        check_compute_dtype(engine(**changes), FlashPrefillConfig(compute_dtype="fp8"), capability)
    assert says in str(error.value) and str(error.value).startswith('flashprefill: compute_dtype "fp8" is for ')


@pytest.mark.parametrize(
    "capability, changes",
    [
        ((9, 0), {"cache": FP8}),
        ((9, 0), {"cache": {"cache_dtype": "fp8_e4m3"}, "head_size": 64}),
        ((9, 0), {"cache": {**FP8, "kv_cache_dtype_skip_layers": ["0"]}}),
        ((9, 0), {"quantization": "compressed-tensors"}),
        ((9, 0), {"cache": FP8, "hf_text_config": None}),
        # Dense anyway.
        ((8, 0), {"use_mla": True}),
        ((8, 0), {"cache": {"sliding_window": 4096}}),
        ((9, 0), {"parallel": {"decode_context_parallel_size": 2}}),
        ((9, 0), {"cache": FP8, "head_size": 96}),
    ],
)
def test_an_engine_whose_products_can_be_in_e4m3_or_that_is_dense_anyway_starts(capability, changes):
    check_compute_dtype(engine(**changes), FlashPrefillConfig(compute_dtype="fp8"), capability)


def test_products_in_16_bits_are_had_everywhere():
    for capability in (None, (8, 0), (9, 0)):
        check_compute_dtype(engine(head_size=256), FlashPrefillConfig(), capability)
