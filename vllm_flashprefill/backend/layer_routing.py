"""Which layers are always dense, and why."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from vllm_flashprefill.checks import HEAD_SIZES, fp8_misfit
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.routing import DenseReason

logger = logging.getLogger("vllm.flashprefill")

# vLLM's names of caches that hold what the model computes.
PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")
# Of caches in e4m3 with one scale for all keys of a layer and one for its values, or one for each KV head.
E4M3_CACHE_DTYPES = ("fp8", "fp8_e4m3")
E4M3_SCALES = "one scale, or one for each KV head"


def layer_dense_reason(impl: Any, layer_name: str, config: FlashPrefillConfig) -> DenseReason | None:
    """Why this attention layer is always dense, or None where its prefills may be sparse.

    Args:
        impl: as of `impl_dense_reason`.
        layer_name: vLLM's name of the layer, such as ``model.layers.3.self_attn.attn``.
    """
    reason = impl_dense_reason(impl)
    if reason is None and config.num_dense_layers and layer_index(layer_name) < config.num_dense_layers:
        return DenseReason.DENSE_LAYER
    return reason


def check_layer_names(layers: Mapping[str, Any], config: FlashPrefillConfig) -> None:
    """See, before any step, that the index of each layer is known which `num_dense_layers` asks for.

    Args:
        layers: vLLM's layers by name; those without an impl of FlashPrefill are skipped.

    Raises:
        ValueError: one has no index in its name.
    """
    for name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if hasattr(impl, "flashprefill_config"):
            layer_dense_reason(impl, name, config)


def impl_dense_reason(impl: Any) -> DenseReason | None:
    """What about an attention layer makes it always dense, wherever in the model it is; or None.

    Args:
        impl: a vLLM attention impl; what it carries of `num_heads`, `attn_type`, `sliding_window`, `logits_soft_cap`,
            `alibi_slopes`, `sinks`, `kv_sharing_target_layer_name`, `kv_cache_dtype`, `takes_e4m3`,
            `dcp_world_size`, `pcp_world_size` and `batch_invariant_enabled` is read.
    """
    attn_type = getattr(impl, "attn_type", "decoder")
    attn_type = getattr(attn_type, "value", attn_type)
    if attn_type == "encoder_decoder":
        return DenseReason.CROSS_ATTENTION
    if attn_type != "decoder":
        return DenseReason.ENCODER
    if getattr(impl, "sliding_window", None) not in (None, (-1, -1), [-1, -1], -1):
        return DenseReason.SLIDING_WINDOW
    if getattr(impl, "logits_soft_cap", None):
        return DenseReason.SOFTCAP
    if getattr(impl, "alibi_slopes", None) is not None:
        return DenseReason.ALIBI
    sinks = getattr(impl, "sinks", None)
    if sinks is not None and (getattr(sinks, "shape", None) != (impl.num_heads,) or sinks.dtype.itemsize not in (2, 4)):
        return DenseReason.SINKS
    if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
        return DenseReason.KV_SHARING
    if getattr(impl, "kv_cache_dtype", "auto") not in PLAIN_CACHE_DTYPES:
        if not (has_e4m3_cache(impl) and getattr(impl, "takes_e4m3", False)):
            return DenseReason.QUANTIZED_KV_CACHE
    if getattr(impl, "dcp_world_size", 1) > 1 or getattr(impl, "pcp_world_size", 1) > 1:
        return DenseReason.CONTEXT_PARALLEL
    if getattr(impl, "batch_invariant_enabled", False):
        # A chunk's start within a block changes what is selected, and other requests move where chunks start.
        return DenseReason.BATCH_INVARIANT
    return None


def say_quantised_cache(impl: Any, cache_config: Any) -> None:
    """Say, once for each kind of cache, that layers stay dense for it, where no warning says it of the whole engine.

    Args:
        impl: as of `impl_dense_reason`.
        cache_config: vLLM's, of the engine.
    """
    if impl_dense_reason(impl) is not DenseReason.QUANTIZED_KV_CACHE:
        return
    has_others = bool(getattr(cache_config, "kv_cache_dtype_skip_layers", None))
    if has_others or getattr(cache_config, "cache_dtype", None) != impl.kv_cache_dtype:
        _warn_cache(impl.kv_cache_dtype, getattr(impl, "takes_e4m3", False))


@functools.cache
def _warn_cache(dtype: str, takes_e4m3: bool) -> None:
    logger.warning(
        "FlashPrefill: layers with a KV cache in %s stay dense: what is read is %s",
        dtype,
        f"16 bits, or e4m3 with {E4M3_SCALES}" if takes_e4m3 else "16 or 32 bits, on a CPU",
    )


def layer_config(impl: Any, config: FlashPrefillConfig, cache_config: Any) -> FlashPrefillConfig:
    """An engine's config as it is for a layer: one that vLLM was told to leave in 16 bits has its products there too.

    Args:
        impl: as of `impl_dense_reason`, with `head_size` and `is_draft`.
        cache_config: vLLM's, of the engine.

    Raises:
        ValueError: the layer may be sparse, and its products cannot be in e4m3 as `compute_dtype` asks.
    """
    if config.compute_dtype != "fp8" or impl.is_draft or impl.head_size not in HEAD_SIZES:
        return config
    if impl_dense_reason(impl) not in (None, DenseReason.QUANTIZED_KV_CACHE):
        return config
    is_e4m3 = has_e4m3_cache(impl)
    if not is_e4m3 and getattr(cache_config, "cache_dtype", None) in E4M3_CACHE_DTYPES:
        return dataclasses.replace(config, compute_dtype="auto")
    if (misfit := fp8_misfit(gpu_capability(), is_e4m3, impl.head_size)) is not None:
        raise ValueError(f"flashprefill: compute_dtype {misfit}")

    # Where there is a GPU there is Triton.
    from vllm_flashprefill.kernels import sparse_attention

    if sparse_attention.hopper_fp8 is None:
        version = sparse_attention.triton.__version__
        raise ValueError(
            f'flashprefill: compute_dtype "fp8" needs a Triton with Gluon as the kernel knows it (3.5 to 3.9), not '
            f'{version}; leave it at "auto"'
        )
    return config


def gpu_capability() -> tuple[int, int] | None:
    """Of the worker's GPU; None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def has_e4m3_cache(impl: Any) -> bool:
    return getattr(impl, "kv_cache_dtype", "auto") in E4M3_CACHE_DTYPES


def has_quantised_query(impl: Any) -> bool:
    """Whether vLLM hands this impl queries in e4m3, as it may where the cache is. A method of it, in 0.12.0 to 0.15."""
    takes = getattr(impl, "supports_quant_query_input", False)
    return has_e4m3_cache(impl) and bool(takes() if callable(takes) else takes)


def layer_index(layer_name: str) -> int:
    """The layer's index in its model: the first number among the dotted parts of its name.

    Raises:
        ValueError: the name has no number.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer_name)
    if found is None:
        raise ValueError(
            f"flashprefill: attention layer {layer_name!r} has no layer index in its name, which num_dense_layers needs"
        )
    return int(found.group(1))
