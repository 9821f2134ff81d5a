"""The attention interface: sparse, or transformers' sdpa with a reason, and counters of both."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vllm_flashprefill.api import flash_prefill
from vllm_flashprefill.checks import DTYPES, HEAD_SIZES
from vllm_flashprefill.config import FlashPrefillConfig, preset, preset_beside
from vllm_flashprefill.counters import Stats
from vllm_flashprefill.hf.mask import CausalMask
from vllm_flashprefill.routing import DenseReason, request_dense_reason

logger = logging.getLogger(__name__)

_options: tuple[Mapping[str, Any], ...] = ()
_sparse_tokens = 0
_dense_tokens: Counter[DenseReason] = Counter()
# Kept and visible, counted where the blocks are selected, so that no layer waits for its GPU.
_block_counts: dict[torch.device, Tensor] = {}
# Devices, head sizes and dtypes that the kernels do not run for.
_failed: set[tuple[torch.device, int, torch.dtype]] = set()


def use_options(*options: Mapping[str, Any]) -> None:
    """Take the options of every layer from these, the first that names one, and else from its preset."""
    global _options
    _options = options
    layer_config.cache_clear()


@functools.cache
def layer_config(model_type: str | None, head_size: int) -> FlashPrefillConfig:
    return FlashPrefillConfig.from_options(*_options, preset_beside(preset(model_type, head_size), *_options))


def stats() -> Stats:
    """What attention did in this process since it started: density, and dense tokens by reason.

    Subtract an earlier reading to see one stretch of work. Times are not measured. Reading waits for the GPU.
    """
    counts = [counts.tolist() for counts in _block_counts.values()]
    return Stats(
        sparse_tokens=_sparse_tokens,
        dense_tokens={reason.value: tokens for reason, tokens in _dense_tokens.items()},
        kept_blocks=sum(kept for kept, _ in counts),
        visible_blocks=sum(visible for _, visible in counts),
    )


def flash_prefill_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface.

    Args:
        module: the attention layer.
        query: [batch, H, T, D]. key, value: [batch, G, S, D], the keys so far or a whole preallocated cache.
        attention_mask: from `flash_prefill_mask`; None is causal, or not, as sdpa understands it.
        kwargs: what the model passes to any implementation.

    Returns:
        [batch, T, H, D], and None for the weights.

    Raises:
        ValueError: sdpa would ignore a part of this layer's attention (softcap, sinks, packed sequences, the cache of
            continuous batching).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, what in (("softcap", "a softcap"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"flashprefill: {type(module).__name__} has {what}, which transformers' sdpa does not compute; "
                "load this model with another attn_implementation"
            )
    if kwargs.get("cache") is not None:
        # On transformers 4; 5 refuses our name itself.
        raise ValueError(
            "flashprefill: the cache of transformers' continuous batching is read by implementations of its own alone; "
            'call model.set_attn_implementation("sdpa_paged") first'
        )
    arguments = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
    if torch.jit.is_tracing() or (query.shape[2] == 1 and torch.compiler.is_compiling()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return _attend(module, query, key, value, attention_mask, arguments)


@torch.compiler.disable
def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, None]:
    """`flash_prefill_attention`, sparse or dense."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (mask is None and arguments.get("cu_seq_lens_q") is not None) or (mask is not None and mask.dim() == 2):
        raise ValueError(
            f"flashprefill: {type(module).__name__} was called as FlashAttention is, with packed sequences or a mask "
            'of tokens; give this part of the model another attn_implementation, as {"vision_config": "sdpa"} does'
        )
    causal_without_mask = arguments["is_causal"]
    if causal_without_mask is None:
        causal_without_mask = getattr(module, "is_causal", True)
    batch, _, query_len, head_size = query.shape
    context_len = mask.context_len if isinstance(mask, CausalMask) else 0
    seq_len = context_len + query_len
    config = layer_config(getattr(getattr(module, "config", None), "model_type", None), head_size)
    kind = query.device, head_size, query.dtype
    reason = (
        _layer_reason(module, (query, key, value), config, arguments)
        or _mask_reason(query, key, mask, causal_without_mask)
        # Where the prompt ends is not said, and a few tokens after others may be drafts.
        or request_dense_reason(query_len, context_len, None, config)
        or (DenseReason.KERNEL_FAILED if kind in _failed else None)
    )
    if reason is None:
        q, k, v = (
            x.transpose(1, 2) if x.stride(-1) == 1 else x.transpose(1, 2).contiguous()
            for x in (query, key[:, :, :seq_len], value[:, :, :seq_len])
        )
        counts = _block_counts_on(query.device)
        counts_before = counts.clone()
        try:
            out = flash_prefill(q, k, v, config=config, softmax_scale=arguments["scaling"], block_counts=counts)
        except Exception as error:
            # What else fails, for want of memory say, may run the next time.
            if not type(error).__module__.startswith("triton."):
                raise
            counts.copy_(counts_before)
            _failed.add(kind)
            reason = DenseReason.KERNEL_FAILED
            logger.warning(
                "FlashPrefill: layers with heads of %d, %s on %s stay dense, since the kernels do not run for them: %s",
                head_size,
                query.dtype,
                query.device,
                error,
            )
        else:
            global _sparse_tokens
            _sparse_tokens += batch * query_len
            return out, None

    _dense_tokens[reason] += batch * query_len
    if isinstance(mask, CausalMask):
        if causal_without_mask and context_len == 0 and mask.is_whole(query, key):
            key, value, mask = key[:, :, :query_len], value[:, :, :query_len], None
        else:
            mask = mask.materialise()
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


def _layer_reason(
    module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], config: FlashPrefillConfig, arguments: Mapping[str, Any]
) -> DenseReason | None:
    """Why this call is dense whatever its mask and lengths, or None."""
    query, key, value = qkv
    if arguments.get("sliding_window") is not None:
        return DenseReason.SLIDING_WINDOW
    if any(arguments.get(name) is not None for name in ("position_bias", "head_mask", "cu_seq_lens_q")):
        return DenseReason.CUSTOM_MASK
    if config.num_dense_layers:
        layer_index = getattr(module, "layer_idx", None)
        if layer_index is None or layer_index < config.num_dense_layers:
            return DenseReason.DENSE_LAYER
    # Reentrant checkpointing runs a layer without gradients first: only `training` says that it trains.
    if module.training or arguments["dropout"] or (torch.is_grad_enabled() and any(x.requires_grad for x in qkv)):
        return DenseReason.TRAINING
    if query.device.type not in ("cpu", "cuda"):
        return DenseReason.DEVICE
    if not query.dtype == key.dtype == value.dtype or (query.is_cuda and query.dtype not in DTYPES):
        return DenseReason.DTYPE
    if key.shape != value.shape or (query.is_cuda and query.shape[-1] not in HEAD_SIZES):
        return DenseReason.HEAD_SIZE
    return None


def _mask_reason(query: Tensor, key: Tensor, mask: Tensor | None, causal_without_mask: bool) -> DenseReason | None:
    """Why a call with this mask is dense, or None where it is plain causal attention."""
    if mask is None and not causal_without_mask:
        return DenseReason.ENCODER if query.shape[2] == key.shape[2] else DenseReason.CROSS_ATTENTION
    if query.shape[2] == 1:
        return DenseReason.DECODE
    if mask is None:
        # sdpa then lets query row i see the keys up to i, whatever follows them.
        return None if query.shape[2] <= key.shape[2] else DenseReason.CUSTOM_MASK
    if isinstance(mask, CausalMask):
        return mask.reason if mask.is_whole(query, key) else DenseReason.CUSTOM_MASK
    return getattr(mask, "flashprefill_reason", DenseReason.CUSTOM_MASK)


def _block_counts_on(device: torch.device) -> Tensor:
    if device not in _block_counts:
        # A tensor made in inference mode could not be added to outside it.
        with torch.inference_mode(False):
            _block_counts[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return _block_counts[device]
