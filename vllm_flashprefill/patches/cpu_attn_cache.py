"""The KV cache of CPU_ATTN in vLLM 0.11.1 and newer: pages of each head, which vLLM's kernel orders as it likes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder

from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin
from vllm_flashprefill.backend.builder import FlashPrefillBuilderMixin
from vllm_flashprefill.checks import PAGE_SIZE_MULTIPLE
from vllm_flashprefill.routing import DenseReason


class FlashPrefillCPUMetadataBuilder(FlashPrefillBuilderMixin, CPUAttentionMetadataBuilder):
    def new_cache(self, num_pages, page_size, num_kv_heads, head_size, dtype, device) -> torch.Tensor:
        # Not said any more from 0.29.0 on.
        if hasattr(CPUAttentionBackend, "get_kv_cache_shape"):
            shape = CPUAttentionBackend.get_kv_cache_shape(num_pages, page_size, num_kv_heads, head_size)
        else:
            shape = num_pages, num_kv_heads, page_size, 2 * head_size
        return torch.empty(shape, dtype=dtype, device=device)


class CPUAttnCacheImplMixin(FlashPrefillImplMixin):
    """Goes before a version's CPUAttentionBackendImpl, whose class says how keys and values lie in the cache."""

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        if (reason := super().dense_reason(layer, kv_cache, attn_metadata)) is not None:
            return reason
        if attn_metadata.use_sdpa_prefill:
            return DenseReason.CPU_ARCHITECTURE
        isa = self._isa(layer, attn_metadata)
        page_size = self.split_kv(kv_cache)[0].shape[2]
        self._layouts = _layouts(isa, page_size, self.head_size, kv_cache.dtype)
        if page_size % PAGE_SIZE_MULTIPLE or None in self._layouts:
            return DenseReason.KV_CACHE_LAYOUT
        return None

    def _isa(self, layer: Any, attn_metadata: Any) -> str:
        """Which instructions vLLM's kernels use; in its metadata up to 0.23, its impl to 0.28, then in the layer."""
        return next(owner.isa for owner in (attn_metadata, self, layer) if hasattr(owner, "isa"))

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        cache, slots = self.split_kv(kv_cache), attn_metadata.slot_mapping
        ops.cpu_attn_reshape_and_cache(key, value, *cache, slots, self._isa(layer, attn_metadata))

    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [num_pages, G, page_size, D] each."""
        raise NotImplementedError

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (_by_token(cache, layout) for cache, layout in zip(self.split_kv(kv_cache), self._layouts, strict=True))
        return k, v


class HeadwiseCacheMixin:
    """A cache of [num_pages, G, page_size, 2 * D] in shape; in memory a head's keys of a page, then its values."""

    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_pages, num_kv_heads, page_size, _ = kv_cache.shape
        return kv_cache.view(num_pages, num_kv_heads, 2 * page_size, -1).chunk(2, dim=2)


def _by_token(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """[num_pages, G, page_size, D] as vLLM stores it, to a [num_pages, page_size, G, D] view."""
    if layout == "dims":
        num_pages, num_kv_heads, page_size, head_size = cache.shape
        cache = cache.view(num_pages, num_kv_heads, head_size, page_size).transpose(2, 3)
    return cache.transpose(1, 2)


@functools.cache
def _layouts(isa: str, page_size: int, head_size: int, dtype: torch.dtype) -> tuple[str | None, str | None]:
    takes_scales = "k_scale" in inspect.signature(ops.cpu_attn_reshape_and_cache).parameters
    scales = dict(k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto") if takes_scales else {}

    def write(key, value, k_cache, v_cache, slots):
        ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, slots, isa, **scales)

    return written_as(write, page_size=page_size, head_size=head_size, dtype=dtype)


def written_as(
    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    *,
    page_size: int,
    head_size: int,
    dtype: torch.dtype,
) -> tuple[str | None, str | None]:
    """How vLLM's cache write orders a page of one head, found by writing one: vLLM does not say.

    Args:
        write: called with key and value [page_size, 1, D], caches [1, 1, page_size, D] and slots [page_size].

    Returns:
        for keys and for values: "tokens" where the page is [page_size, D], "dims" where it is [D, page_size],
        None where it is something else.
    """
    token = torch.arange(page_size)[:, None].expand(page_size, head_size)
    dim = torch.arange(head_size)[None, :].expand(page_size, head_size)
    found: list[str | None] = []
    readings = []
    # Codes of small integers, which every cache dtype holds exactly.
    for code in (token % 64, dim % 64, token // 64, dim // 64):
        rows = code[:, None, :].to(dtype).contiguous()
        k_cache = torch.full((1, 1, page_size, head_size), -1.0, dtype=dtype)
        v_cache = k_cache.clone()
        write(rows, rows.clone(), k_cache, v_cache, torch.arange(page_size))
        readings.append((k_cache.flatten().long(), v_cache.flatten().long()))
    for cache in (0, 1):
        token_low, dim_low, token_high, dim_high = (reading[cache] for reading in readings)
        position = (token_low + 64 * token_high) * head_size + dim_low + 64 * dim_high
        if torch.equal(position, torch.arange(page_size * head_size)):
            found.append("tokens")
        elif torch.equal(position.view(head_size, page_size).T.flatten(), torch.arange(page_size * head_size)):
            found.append("dims")
        else:
            found.append(None)
    return found[0], found[1]
