"""Hugging Face transformers: sparse prefill as the attention implementation "flashprefill".

    from vllm_flashprefill import hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashprefill")

A prefill is sparse where it is plain causal attention over an unpadded batch; everything else goes through
transformers' "sdpa" and is counted with its reason (`stats`). torch.compile takes a decode's sdpa into its graph, where
nothing counts it, and breaks the graph at a prefill. Options, presets and their order are those of
`vllm_flashprefill.config`, without the engine's.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_flashprefill.api import flash_prefill
from vllm_flashprefill.checks import DTYPES, HEAD_SIZES
from vllm_flashprefill.config import FlashPrefillConfig, env_options, preset
from vllm_flashprefill.counters import Stats
from vllm_flashprefill.routing import DenseReason, request_dense_reason

NAME = "flashprefill"
OLDEST_TRANSFORMERS = "4.56"

# The options given in code and those of the environment when they were; None where nothing is registered.
_options: dict[str, Any] | None = None
_environ: Mapping[str, Any] = {}


def register(**options: Any) -> None:
    """Make "flashprefill" known to transformers. Calling it again with the same options does nothing.

    Args:
        options: fields of `FlashPrefillConfig`; environment variables win over them.

    Raises:
        ValueError: an unknown option or variable, a wrong type or a value out of range.
        RuntimeError: transformers is missing or too old, or a registration with other options before.
    """
    global _options, _environ
    FlashPrefillConfig.from_options(options)
    environ = env_options()
    FlashPrefillConfig.from_options(environ, options)
    if _options is not None:
        if options != _options:
            raise RuntimeError(
                f"flashprefill is already registered with transformers, with the options {_options}; "
                "call vllm_flashprefill.hf.unregister() before registering others"
            )
        return
    _check_transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    _replace_flash_attention_check()
    AttentionInterface.register(NAME, flash_prefill_attention)
    AttentionMaskInterface.register(NAME, flash_prefill_mask)
    _options, _environ = options, environ
    _config.cache_clear()


def unregister() -> None:
    """Undo `register`; nothing if there is nothing to undo.

    A model that was loaded with "flashprefill" has to be given another implementation, by
    ``model.set_attn_implementation("sdpa")``, or a new registration before it runs again.
    """
    global _options
    if _options is None:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)
    _restore_flash_attention_check()
    _options = None


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


_sparse_tokens = 0
_dense_tokens: Counter[DenseReason] = Counter()
# Kept and visible, counted where the blocks are selected, so that no layer waits for its GPU.
_block_counts: dict[torch.device, torch.Tensor] = {}


class CausalMask(torch.Tensor):
    """The causal mask of an unpadded batch, [batch, 1, T, S] bool, which takes no memory until something reads it.

    Sparse layers and dense ones without context do not. A mask that was read or changed by model code is
    an unknown one from then on.

    Attributes:
        context_len: tokens before the first query; keys from context_len + T on hold no tokens yet.
        reason: why layers with this mask are dense, or None.
        was_read: whether any PyTorch operation has seen the mask.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, shape: tuple[int, ...], device: torch.device, *args: Any) -> CausalMask:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        make: Callable[[], torch.Tensor],
        context_len: int,
        reason: DenseReason | None,
    ) -> None:
        self.context_len, self.reason, self.was_read = context_len, reason, False
        self._make = functools.cache(make)

    def materialise(self) -> torch.Tensor:
        return self._make()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(mask: CausalMask) -> torch.Tensor:
            mask.was_read = True
            return mask.materialise()

        args, kwargs = torch.utils._pytree.tree_map_only(cls, read, (args, kwargs or {}))
        return func(*args, **kwargs)


def flash_prefill_mask(**arguments: Any) -> torch.Tensor | None:
    """The mask interface: a `CausalMask` where that is what the mask is, else what sdpa gets.

    Args:
        arguments: those of transformers' `sdpa_mask`, of any supported version.
    """
    from transformers.masking_utils import sdpa_mask

    query_len = arguments["q_length"] if "q_length" in arguments else arguments["cache_position"].shape[0]
    if query_len == 1 or torch.jit.is_tracing():
        return sdpa_mask(**arguments)
    return _prefill_mask(query_len, arguments)


@torch.compiler.disable
def _prefill_mask(query_len: int, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    kv_len, window = arguments["kv_length"], arguments.get("local_size")
    # With a window, transformers passes a function made for it; it allows the skip where nothing else was added.
    if window is None:
        is_causal = arguments["mask_function"] is causal_mask_function
    else:
        is_causal = arguments["allow_is_causal_skip"] and kv_len <= window
    context_len = _context_len(arguments, query_len) if arguments.get("kv_offset", 0) == 0 else None
    padding = arguments.get("attention_mask")
    seq_len = kv_len if context_len is None else context_len + query_len
    is_padded = padding is not None and (padding.shape[-1] < seq_len or not bool(padding[:, :seq_len].all()))
    reason = DenseReason.SLIDING_WINDOW if window is not None else DenseReason.PADDING if is_padded else None
    if is_causal and context_len is not None and not is_padded:
        return CausalMask(
            (arguments["batch_size"], 1, query_len, kv_len),
            arguments["device"] if "device" in arguments else arguments["cache_position"].device,
            functools.partial(sdpa_mask, **{**arguments, "allow_is_causal_skip": False}),
            context_len,
            reason,
        )
    mask = sdpa_mask(**arguments)
    if mask is not None:
        mask.flashprefill_reason = reason or DenseReason.CUSTOM_MASK
    return mask


def flash_prefill_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface.

    Args:
        module: the attention layer.
        query: [batch, H, T, D]. key, value: [batch, G, S, D], the keys so far or a whole preallocated cache.
        attention_mask: from `flash_prefill_mask`; None is causal, or not, as sdpa understands it.
        kwargs: what the model passes to any implementation.

    Returns:
        [batch, T, H, D], and None for the weights.

    Raises:
        ValueError: sdpa would ignore a part of this layer's attention (softcap, sinks, packed sequences).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, what in (("softcap", "a softcap"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"flashprefill: {type(module).__name__} has {what}, which transformers' sdpa does not compute; "
                "load this model with another attn_implementation"
            )
    arguments = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
    if torch.jit.is_tracing() or (query.shape[2] == 1 and torch.compiler.is_compiling()):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    return _attend(module, query, key, value, attention_mask, arguments)


@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    arguments: Mapping[str, Any],
) -> tuple[torch.Tensor, None]:
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
    config = _config(getattr(getattr(module, "config", None), "model_type", None), head_size)
    reason = (
        _layer_reason(module, query, key, value, config, arguments)
        or _mask_reason(query, key, mask, causal_without_mask)
        or request_dense_reason(query_len, context_len, seq_len, config)
    )
    if reason is None:
        q, k, v = (
            x.transpose(1, 2) if x.stride(-1) == 1 else x.transpose(1, 2).contiguous()
            for x in (query, key[:, :, :seq_len], value[:, :, :seq_len])
        )
        counts = _block_counts_on(query.device)
        out = flash_prefill(q, k, v, config=config, softmax_scale=arguments["scaling"], block_counts=counts)
        global _sparse_tokens
        _sparse_tokens += batch * query_len
        return out, None

    _dense_tokens[reason] += batch * query_len
    if isinstance(mask, CausalMask):
        if causal_without_mask and context_len == 0 and _is_whole(mask, query, key):
            key, value, mask = key[:, :, :query_len], value[:, :, :query_len], None
        else:
            mask = mask.materialise()
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


def _layer_reason(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: FlashPrefillConfig,
    arguments: Mapping[str, Any],
) -> DenseReason | None:
    """Why this call is dense whatever its mask and lengths, or None."""
    if arguments.get("sliding_window") is not None:
        return DenseReason.SLIDING_WINDOW
    if any(arguments.get(name) is not None for name in ("position_bias", "head_mask", "cu_seq_lens_q")):
        return DenseReason.CUSTOM_MASK
    if config.num_dense_layers:
        layer_index = getattr(module, "layer_idx", None)
        if layer_index is None or layer_index < config.num_dense_layers:
            return DenseReason.DENSE_LAYER
    if arguments["dropout"] or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return DenseReason.TRAINING
    if query.device.type not in ("cpu", "cuda"):
        return DenseReason.DEVICE
    if not query.dtype == key.dtype == value.dtype or (query.is_cuda and query.dtype not in DTYPES):
        return DenseReason.DTYPE
    if key.shape != value.shape or (query.is_cuda and query.shape[-1] not in HEAD_SIZES):
        return DenseReason.HEAD_SIZE
    return None


def _mask_reason(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal_without_mask: bool
) -> DenseReason | None:
    """Why a call with this mask is dense, or None where it is plain causal attention."""
    if mask is None and not causal_without_mask:
        return DenseReason.ENCODER if query.shape[2] == key.shape[2] else DenseReason.CROSS_ATTENTION
    if query.shape[2] == 1:
        return DenseReason.DECODE
    if mask is None:
        # sdpa then lets query row i see the keys up to i, whatever follows them.
        return None if query.shape[2] <= key.shape[2] else DenseReason.CUSTOM_MASK
    if isinstance(mask, CausalMask):
        return mask.reason if _is_whole(mask, query, key) else DenseReason.CUSTOM_MASK
    return getattr(mask, "flashprefill_reason", DenseReason.CUSTOM_MASK)


def _is_whole(mask: CausalMask, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the mask is as it was made, and made for these queries and keys."""
    return not mask.was_read and mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])


def _context_len(arguments: Mapping[str, Any], query_len: int) -> int | None:
    """Tokens before the first query; None where the queries are not consecutive tokens of the keys.

    Once a forward, and waits for the GPU where only it knows: a chunk on transformers 4, a preallocated cache.
    """
    kv_len = arguments["kv_length"]
    if "q_offset" in arguments:
        context_len = int(arguments["q_offset"])
    elif kv_len == query_len:
        context_len = 0
    else:
        context_len, last = arguments["cache_position"][[0, -1]].tolist()
        if last - context_len + 1 != query_len:
            return None
    return context_len if context_len + query_len <= kv_len else None


def _block_counts_on(device: torch.device) -> torch.Tensor:
    if device not in _block_counts:
        # A tensor made in inference mode could not be added to outside it.
        with torch.inference_mode(False):
            _block_counts[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return _block_counts[device]


@functools.cache
def _config(model_type: str | None, head_size: int) -> FlashPrefillConfig:
    return FlashPrefillConfig.from_options(_environ, _options or {}, preset(model_type, head_size))


def _check_transformers() -> None:
    from packaging.version import Version

    try:
        from transformers import __version__
    except ImportError as error:
        raise RuntimeError(
            f"flashprefill needs transformers {OLDEST_TRANSFORMERS} or newer, which cannot be imported: {error}"
        ) from error
    if Version(__version__) < Version(OLDEST_TRANSFORMERS):
        raise RuntimeError(f"flashprefill needs transformers {OLDEST_TRANSFORMERS} or newer, not {__version__}")


def _replace_flash_attention_check() -> None:
    """Have transformers 5 not take "flashprefill" for one of FlashAttention's kernels.

    Target: `transformers.utils.generic.is_flash_attention_requested`, under which every name that contains "flash"
    is fetched as a kernel from the hub, and gets packed sequences and no masks. How: every module that holds the
    function is given one that says no to this name; modules imported later find it in place. It can go when
    transformers asks for FlashAttention's own names. Transformers 4 has no such function and needs none.

    Raises:
        RuntimeError: the function is not where it is looked for.
    """
    import transformers
    from packaging.version import Version
    from transformers.utils import generic

    original = getattr(generic, "is_flash_attention_requested", None)
    if original is None:
        if Version(transformers.__version__).major >= 5:
            raise RuntimeError(
                f"transformers {transformers.__version__} has no utils.generic.is_flash_attention_requested "
                "for flashprefill to extend"
            )
        return

    @functools.wraps(original)
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        if name == NAME:
            return False
        return original(config, requested_attention_implementation, *args, **kwargs)

    _rebind(original, is_flash_attention_requested)


def _restore_flash_attention_check() -> None:
    from transformers.utils import generic

    replaced = getattr(generic, "is_flash_attention_requested", None)
    if replaced is not None:
        _rebind(replaced, replaced.__wrapped__)


def _rebind(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` in place of `old` in all modules that hold it under its name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(old.__name__) is old:
            setattr(module, old.__name__, new)
