"""Why an engine can prune nothing, as far as its configuration says, and what to change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_flashprefill.backend.layer_routing import E4M3_CACHE_DTYPES, E4M3_SCALES, PLAIN_CACHE_DTYPES
from vllm_flashprefill.checks import DTYPES, FP8_HEAD_SIZES, HEAD_SIZES, PAGE_SIZE_MULTIPLE, fp8_misfit
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.routing import DenseReason, request_dense_reason

# vLLM's names of the backends that FlashPrefill takes the place of, and of its own.
OUR_BACKENDS = frozenset({"FLASH_ATTN", "FLASH_ATTN_VLLM_V1", "CPU_ATTN", "TORCH_SDPA", "TORCH_SDPA_VLLM_V1", "CUSTOM"})
# Major compute capabilities on which vLLM's FlashAttention, whose place is taken, has e4m3 caches and attention sinks.
NEWER_FLASH_ATTENTION = (9, 10)


def engine_dense_reason(
    vllm_config: Any, config: FlashPrefillConfig, backend: str | None, capability: tuple[int, int] | None
) -> str | None:
    """Why nothing of an engine can be pruned, and what to do about it; None where something can, as far as is known.

    Args:
        vllm_config: a ``vllm.config.VllmConfig``; what it lacks is taken to be no reason.
        backend: vLLM's name of the attention backend that was asked for, None if it is to choose.
        capability: the GPU's compute capability, None where there is no GPU.
    """
    model = vllm_config.model_config
    return (
        _model_reason(model)
        or _backend_reason(backend, capability)
        or _cache_reason(getattr(vllm_config, "cache_config", None), capability)
        or _parallel_reason(getattr(vllm_config, "parallel_config", None))
        or (_gpu_reason(model, capability) if capability is not None else None)
        or _layers_reason(model, getattr(vllm_config, "cache_config", None), config)
        or _length_reason(model, config)
        or ("alpha is 0, which keeps every block; raise it" if config.alpha == 0 else None)
    )


def check_compute_dtype(vllm_config: Any, config: FlashPrefillConfig, capability: tuple[int, int] | None) -> None:
    """See that an engine's products can be in e4m3 where `compute_dtype` asks for it, as far as is known.

    Args:
        vllm_config, capability: as of `engine_dense_reason`.

    Raises:
        ValueError: they cannot; the message says what to do.
    """
    if config.compute_dtype != "fp8":
        return
    model, cache = vllm_config.model_config, getattr(vllm_config, "cache_config", None)
    parallel = getattr(vllm_config, "parallel_config", None)
    if _model_reason(model) or _parallel_reason(parallel) or _layers_reason(model, cache, config):
        # All layers are dense whatever the cache and the GPU are, which is warned of.
        return
    cache_dtype = getattr(cache, "cache_dtype", "auto")
    # What a quantised checkpoint declares may be left to the layers.
    is_e4m3 = cache_dtype in E4M3_CACHE_DTYPES or (
        cache_dtype == "auto" and getattr(model, "quantization", None) is not None
    )
    head_size = _head_size(model)
    # Layers with heads of no size that the kernels take are dense.
    head_size = head_size if head_size in HEAD_SIZES else FP8_HEAD_SIZES[0]
    if (misfit := fp8_misfit(capability, is_e4m3, head_size)) is not None:
        raise ValueError(f"flashprefill: compute_dtype {misfit}")


def layer_dense_words(vllm_config: Any, config: FlashPrefillConfig) -> list[str | None]:
    """What the model's config says of each layer: why it is dense, None where its prefills may be sparse.

    A `DenseReason`, or ``linear_attention``, which is no attention and is not counted. Empty where the config does not
    say how many layers there are.

    Args:
        vllm_config: as of `engine_dense_reason`.
    """
    text = getattr(vllm_config.model_config, "hf_text_config", None)
    kinds, never = _layer_kinds(text)
    every = next((reason.value for reason, _ in _every_layer(text)), None)
    if getattr(getattr(vllm_config, "cache_config", None), "sliding_window", None) is not None:
        every = DenseReason.SLIDING_WINDOW.value
    shared = _said(text, "num_kv_shared_layers")
    first_shared = len(kinds) - (shared if isinstance(shared, int) else 0)
    words: list[str | None] = []
    for index, kind in enumerate(kinds):
        if kind in never:
            words.append(DenseReason.SLIDING_WINDOW.value if kind == "sliding_attention" else kind)
        elif every is not None:
            words.append(every)
        elif index >= first_shared:
            words.append(DenseReason.KV_SHARING.value)
        else:
            words.append(DenseReason.DENSE_LAYER.value if index < config.num_dense_layers else None)
    return words


def _model_reason(model: Any) -> str | None:
    if getattr(model, "use_mla", False):
        return "the model's attention is MLA, which is vLLM's own alone"
    if getattr(model, "attn_type", "decoder") in ("encoder_only", "attention_free"):
        return "the model has no causal attention"
    return None


def _backend_reason(backend: str | None, capability: tuple[int, int] | None) -> str | None:
    if backend is not None and backend not in OUR_BACKENDS:
        return f"the attention backend {backend} was asked for; ask for FLASH_ATTN, or for none"
    if backend is None and capability is not None and capability[0] == 10:
        return (
            "vLLM prefers FlashInfer on this GPU; ask for FLASH_ATTN with --attention-backend or VLLM_ATTENTION_BACKEND"
        )
    return None


def _cache_reason(cache: Any, capability: tuple[int, int] | None) -> str | None:
    cache_dtype = getattr(cache, "cache_dtype", "auto")
    if cache_dtype not in PLAIN_CACHE_DTYPES and not getattr(cache, "kv_cache_dtype_skip_layers", None):
        if cache_dtype not in E4M3_CACHE_DTYPES:
            return (
                f"the KV cache is {cache_dtype}; ask for --kv-cache-dtype bfloat16, float16 or fp8, which is e4m3 with "
                f"{E4M3_SCALES}"
            )
        if capability is None or capability[0] not in NEWER_FLASH_ATTENTION:
            return f"the KV cache is {cache_dtype}, which is sparse on Hopper GPUs; ask for --kv-cache-dtype bfloat16"
    page_size = getattr(cache, "block_size", None)
    if isinstance(page_size, int) and page_size % PAGE_SIZE_MULTIPLE:
        return (
            f"pages of the KV cache are of {page_size} tokens; ask for a --block-size that {PAGE_SIZE_MULTIPLE} divides"
        )
    return None


def _parallel_reason(parallel: Any) -> str | None:
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"the cache is spread over ranks; leave out --{name.replace('_', '-')}"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        return "results are not to depend on the batch, as selections do; unset VLLM_BATCH_INVARIANT"
    return None


def _gpu_reason(model: Any, capability: tuple[int, int]) -> str | None:
    has_sinks = _said(getattr(model, "hf_text_config", None), "model_type") == "gpt_oss"
    if has_sinks and capability[0] not in NEWER_FLASH_ATTENTION:
        return (
            "the model has attention sinks, which vLLM's FlashAttention, whose place is taken, has on Hopper GPUs alone"
        )
    if getattr(model, "dtype", DTYPES[0]) not in DTYPES:
        return "the kernels take bfloat16 and float16; ask for --dtype bfloat16"
    head_size = _head_size(model)
    if head_size is not None and head_size not in HEAD_SIZES:
        return f"the kernels take heads of {', '.join(map(str, HEAD_SIZES))}, and this model's are of {head_size}"
    return None


def _head_size(model: Any) -> int | None:
    try:
        return model.get_head_size()
    except Exception:
        # Of a config that says it by layer, or not at all.
        return None


def _layers_reason(model: Any, cache: Any, config: FlashPrefillConfig) -> str | None:
    text = getattr(model, "hf_text_config", None)
    for _, what in _every_layer(text):
        return f"every layer {what}; only another model would be pruned"
    window = getattr(cache, "sliding_window", None)
    if window is not None:
        # What vLLM gives to every layer that says nothing of itself.
        return (
            f"every layer has a sliding window of {window} tokens; --disable-sliding-window makes them plain, for "
            "sequences of no more tokens"
        )
    kinds, never = _layer_kinds(text)
    if not kinds:
        return None
    able = [index for index, kind in enumerate(kinds) if kind not in never]
    if not able:
        return f"every layer is of {' or '.join(sorted(set(kinds)))}; only another model would be pruned"
    if able[-1] < config.num_dense_layers:
        return f"num_dense_layers is {config.num_dense_layers}; at most {able[-1]} leaves a layer to prune"
    return None


def _every_layer(text: Any) -> Iterator[tuple[DenseReason, str]]:
    """What makes all layers of a model dense, by its config."""
    if _said(text, "attn_logit_softcapping"):
        yield DenseReason.SOFTCAP, "caps its logits"
    if _said(text, "alibi") is True or _said(text, "model_type") == "bloom":
        yield DenseReason.ALIBI, "has ALiBi"


def _layer_kinds(text: Any) -> tuple[Sequence[str], set[str]]:
    """A model's layers by transformers' names of their kinds, none if not said; and which kinds are never sparse."""
    kinds, num_layers = _said(text, "layer_types"), _said(text, "num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        return (), set()
    kinds = kinds if isinstance(kinds, (list, tuple)) and len(kinds) == num_layers else ["full_attention"] * num_layers
    # vLLM 0.10.0 calls it so where not every layer has one.
    windows = any(_said(text, name) for name in ("sliding_window", "interleaved_sliding_window"))
    return kinds, {"linear_attention", "sliding_attention"} if windows else {"linear_attention"}


def _said(config: Any, name: str) -> Any:
    """What a model's config says; None where it does not, or not without a layer's number."""
    try:
        return getattr(config, name)
    except Exception:
        return None


def _length_reason(model: Any, config: FlashPrefillConfig) -> str | None:
    max_len = getattr(model, "max_model_len", None)
    if not isinstance(max_len, int):
        return None
    # A prompt leaves room for a token of its answer, where there is one.
    longest = max_len - (getattr(model, "runner_type", "generate") == "generate")
    reason = request_dense_reason(longest, 0, longest, config)
    if reason is DenseReason.SHORT_PROMPT:
        return (
            f"prompts of under {config.min_sparse_tokens} tokens are dense, and sequences have at most {max_len}; "
            "lower min_sparse_tokens, or raise --max-model-len"
        )
    if reason is not None:
        return (
            f"every block of a prompt of {longest} tokens is kept, and sequences have at most {max_len}; lower "
            "num_sink_blocks, num_window_blocks or num_dense_tail_blocks, or raise --max-model-len"
        )
    return None
