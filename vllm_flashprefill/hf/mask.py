"""The mask interface, and the causal mask that is not made unless something reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from vllm_flashprefill.routing import DenseReason

aten = torch.ops.aten


@dataclasses.dataclass
class Content:
    """What a mask and its aliases share: what changes one changes all."""

    shape: torch.Size
    device: torch.device
    context_len: int
    reason: DenseReason | None
    was_read: bool = False
    made: torch.Tensor | None = None


class CausalMask(torch.Tensor):
    """The causal mask of an unpadded batch, [batch, 1, T, S] bool, which takes no memory until something reads it.

    Sparse layers and dense ones without context do not, and a copy, on another device too, or an alias is a mask of the
    same kind. A mask that was read or changed by model code is an unknown one from then on.

    Attributes:
        context_len: tokens before the first query; keys from context_len + T on hold no tokens yet.
        reason: why layers with this mask are dense, or None.
        was_read: whether any PyTorch operation but a copy has seen the mask.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(
        cls, shape: tuple[int, ...], device: torch.device, context_len: int, reason: DenseReason | None
    ) -> CausalMask:
        return cls._with(Content(torch.Size(shape), device, context_len, reason))

    @classmethod
    def _with(cls, content: Content) -> CausalMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=torch.bool, device=content.device)
        mask._content = content
        return mask

    @property
    def context_len(self) -> int:
        return self._content.context_len

    @property
    def reason(self) -> DenseReason | None:
        return self._content.reason

    @property
    def was_read(self) -> bool:
        return self._content.was_read

    def materialise(self) -> torch.Tensor:
        content = self._content
        if content.made is None:
            # A view of it is one of the mask, and so it is of inference mode where the mask is.
            with torch.inference_mode(self.is_inference()):
                allowed = torch.ones(self.shape[-2:], dtype=torch.bool, device=self.device).tril_(self.context_len)
                content.made = allowed.expand(self.shape)
        return content.made

    def is_whole(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether the mask is as it was made, and made for these queries and keys."""
        return not self.was_read and self.shape == (query.shape[0], 1, query.shape[2], key.shape[2])

    def _copy(self, device: torch.device) -> CausalMask:
        copy = CausalMask(self.shape, device, self.context_len, self.reason)
        if self.was_read:
            copy._content.was_read, copy._content.made = True, self.materialise().to(device, copy=True)
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(mask: CausalMask) -> torch.Tensor:
            mask._content.was_read = True
            return mask.materialise()

        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.detach_.default):
            return args[0]
        if func is aten.alias.default:
            with torch.inference_mode(args[0].is_inference()):
                return cls._with(args[0]._content)
        if func.overloadpacket is aten.to:
            # Inference mode asks for it whole.
            return func.decompose(*args, **kwargs)
        if func in (aten.clone.default, aten._to_copy.default) and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._copy(kwargs.get("device") or args[0].device)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, read, (args, kwargs))
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
        shape = (arguments["batch_size"], 1, query_len, kv_len)
        device = arguments["device"] if "device" in arguments else arguments["cache_position"].device
        return CausalMask(shape, device, context_len, reason)
    mask = sdpa_mask(**arguments)
    if mask is not None:
        mask.flashprefill_reason = reason or DenseReason.CUSTOM_MASK
    return mask


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
