"""Who is sparse: the rule for a request, and the reasons of all that is not."""

from __future__ import annotations

import enum

import numpy as np

from vllm_flashprefill.config import FlashPrefillConfig


class DenseReason(str, enum.Enum):
    """Why tokens went through vLLM's own attention, or transformers'."""

    # of a request
    DECODE = "decode"
    SHORT_PROMPT = "short_prompt"
    NOTHING_TO_PRUNE = "nothing_to_prune"
    # of a step
    SHORT_APPEND = "short_append"
    NOT_PLANNED = "not_planned"
    UNKNOWN_BATCH = "unknown_batch"
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
    KERNEL_FAILED = "kernel_failed"
    SELF_CHECK = "self_check"
    DRAFT = "draft"
    CPU_ARCHITECTURE = "cpu_architecture"
    # of a layer, for a while
    DENSITY = "density"
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

    The rule looks at the whole prompt, so that its chunks are routed as one pass over it would be; what depends on the
    other requests of a step, short appends, `plan.plan_step` adds. A step in which every block would be kept anyway
    (the first blocks, or the dense tail alone) is dense: the result is the same and dense attention is faster.

    Args:
        query_len: tokens of the request in this step.
        context_len: tokens of it in the KV cache before.
        prompt_len: tokens of its whole prefill as far as known; less than the sequence so far where
            speculative tokens follow the last known one. None where it is not known: then the prefill is taken to end
            with this step.
        is_prefilling: what vLLM says of it, None where it does not.
    """
    if is_decode(query_len, context_len, prompt_len, config, is_prefilling):
        return DenseReason.DECODE
    prompt_len = max(prompt_len or 0, context_len + query_len)
    if prompt_len < config.min_sparse_tokens:
        return DenseReason.SHORT_PROMPT
    last_query_block = (context_len + query_len - 1) // config.block_size
    first_tail_block = -(-prompt_len // config.block_size) - config.num_dense_tail_blocks
    if min(last_query_block, first_tail_block - 1) < config.num_sink_blocks + config.num_window_blocks:
        return DenseReason.NOTHING_TO_PRUNE
    if context_len // config.block_size >= first_tail_block:
        return DenseReason.NOTHING_TO_PRUNE
    return None


def is_decode(
    query_len: int | np.ndarray,
    context_len: int | np.ndarray,
    prompt_len: int | np.ndarray | None,
    config: FlashPrefillConfig,
    is_prefilling: bool | np.ndarray | None = None,
) -> bool | np.ndarray:
    """Whether a request generates, or which of many do; arguments as of `request_dense_reason`, or arrays of them.

    A decode with drafted tokens looks like the end of a prompt, but its context may be shorter than the host knows.
    Where neither the prompt's length nor vLLM tells them apart, up to a block of tokens after others is a decode.
    """
    if prompt_len is not None:
        decodes = (context_len > 0) & (context_len + 1 >= prompt_len)
    else:
        decodes = (context_len > 0) & (query_len <= (config.block_size if is_prefilling is None else 1))
    return decodes if is_prefilling is None else decodes | np.logical_not(is_prefilling)
