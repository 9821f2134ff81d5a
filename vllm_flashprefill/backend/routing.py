"""Who is sparse: the rules for a request and for a layer, and the reason of each that is not."""

from __future__ import annotations

import enum
import re
from typing import Any

from vllm_flashprefill.config import FlashPrefillConfig


class DenseReason(str, enum.Enum):
    """Why tokens went through vLLM's own attention, or transformers'."""

    # of a request
    DECODE = "decode"
    SHORT_PROMPT = "short_prompt"
    NOTHING_TO_PRUNE = "nothing_to_prune"
    # of a step
    NOT_PLANNED = "not_planned"
    # of a layer
    DENSE_LAYER = "dense_layer"
    ENCODER = "encoder_attention"
    CROSS_ATTENTION = "cross_attention"
    SLIDING_WINDOW = "sliding_window"
    SOFTCAP = "logits_soft_cap"
    ALIBI = "alibi"
    SINKS = "attention_sinks"
    KV_SHARING = "kv_sharing"
    QUANTIZED_KV_CACHE = "quantized_kv_cache"
    CONTEXT_PARALLEL = "context_parallel"
    BATCH_INVARIANT = "batch_invariant"
    HEAD_SIZE = "head_size"
    DTYPE = "dtype"
    KV_CACHE_LAYOUT = "kv_cache_layout"
    CPU_ARCHITECTURE = "cpu_architecture"
    # of a call by transformers
    PADDING = "padding"
    CUSTOM_MASK = "custom_mask"
    TRAINING = "training"
    DEVICE = "device"


def request_dense_reason(
    query_len: int,
    context_len: int,
    prompt_len: int | None,
    config: FlashPrefillConfig,
    is_prefilling: bool | None = None,
) -> DenseReason | None:
    """Why this request is dense in this step, or None where it is sparse.

    The rule looks at the whole prompt, so that its chunks are routed as one pass over it would be. A step in
    which every block would be kept anyway (the first blocks, or the dense tail alone) is dense: the result is
    the same and dense attention is faster.

    A decode with drafted tokens looks like the end of a prompt, but its context may be shorter than the host knows.
    Where neither the prompt's length nor vLLM tells them apart, up to a block of tokens after others is a decode.

    Args:
        query_len: tokens of the request in this step.
        context_len: tokens of it in the KV cache before.
        prompt_len: tokens of its whole prefill as far as known; less than the sequence so far where
            speculative tokens follow the last known one. None where it is not known: then the prefill is taken to end
            with this step.
        is_prefilling: what vLLM says of it, None where it does not.
    """
    if is_prefilling is False:
        return DenseReason.DECODE
    if prompt_len is None:
        if is_prefilling is None and context_len > 0 and query_len <= config.block_size:
            return DenseReason.DECODE
        prompt_len = context_len + query_len
    if context_len > 0 and context_len + 1 >= prompt_len:
        return DenseReason.DECODE
    prompt_len = max(prompt_len, context_len + query_len)
    if prompt_len < config.min_sparse_tokens:
        return DenseReason.SHORT_PROMPT
    last_query_block = (context_len + query_len - 1) // config.block_size
    first_tail_block = -(-prompt_len // config.block_size) - config.num_dense_tail_blocks
    if min(last_query_block, first_tail_block - 1) < config.num_sink_blocks + config.num_window_blocks:
        return DenseReason.NOTHING_TO_PRUNE
    if context_len // config.block_size >= first_tail_block:
        return DenseReason.NOTHING_TO_PRUNE
    return None


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


def impl_dense_reason(impl: Any) -> DenseReason | None:
    """What about an attention layer makes it always dense, wherever in the model it is; or None.

    Args:
        impl: a vLLM attention impl; what it carries of `attn_type`, `sliding_window`, `logits_soft_cap`,
            `alibi_slopes`, `sinks`, `kv_sharing_target_layer_name`, `kv_cache_dtype`, `dcp_world_size`,
            `pcp_world_size` and `batch_invariant_enabled` is read.
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
    if getattr(impl, "sinks", None) is not None:
        return DenseReason.SINKS
    if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
        return DenseReason.KV_SHARING
    if getattr(impl, "kv_cache_dtype", "auto") not in ("auto", "float16", "bfloat16", "float32"):
        return DenseReason.QUANTIZED_KV_CACHE
    if getattr(impl, "dcp_world_size", 1) > 1 or getattr(impl, "pcp_world_size", 1) > 1:
        return DenseReason.CONTEXT_PARALLEL
    if getattr(impl, "batch_invariant_enabled", False):
        # A chunk's start within a block changes what is selected, and other requests move where chunks start.
        return DenseReason.BATCH_INVARIANT
    return None


# vLLM's names of the backends that FlashPrefill takes the place of, and of its own.
OUR_BACKENDS = frozenset({"FLASH_ATTN", "FLASH_ATTN_VLLM_V1", "CPU_ATTN", "TORCH_SDPA", "TORCH_SDPA_VLLM_V1", "CUSTOM"})


def engine_dense_reason(model_config: Any, backend: str | None, capability: tuple[int, int] | None) -> str | None:
    """Why no layer of an engine can be sparse, as far as its options say, and what to do about it; or None.

    Args:
        model_config: a ``vllm.config.ModelConfig``; of it `use_mla` and `attn_type` are read.
        backend: vLLM's name of the attention backend that was asked for, None if it is to choose.
        capability: the GPU's compute capability, None where there is no GPU.
    """
    if getattr(model_config, "use_mla", False):
        return "the model's attention is MLA, which is vLLM's own alone"
    if getattr(model_config, "attn_type", "decoder") in ("encoder_only", "attention_free"):
        return "the model has no causal attention"
    if backend is not None and backend not in OUR_BACKENDS:
        return f"the attention backend {backend} was asked for; ask for FLASH_ATTN, or for none"
    if backend is None and capability is not None and capability[0] == 10:
        return (
            "vLLM prefers FlashInfer on this GPU; ask for FLASH_ATTN with --attention-backend or VLLM_ATTENTION_BACKEND"
        )
    return None


def layer_index(layer_name: str) -> int:
    """The layer's index in its model: the first number among the dotted parts of its name.

    Raises:
        ValueError: the name has no number.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer_name)
    if found is None:
        raise ValueError(f"attention layer name {layer_name!r} carries no layer index")
    return int(found.group(1))
