"""FlashPrefill in vLLM 0.12.0's CPU attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_flashprefill.backend.builder import FlashPrefillBuilderMixin
from vllm_flashprefill.backend.impl import CPUFlashPrefillImplMixin, written_as
from vllm_flashprefill.backend.routing import DenseReason


class FlashPrefillCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashPrefillCPUImpl]:
        return FlashPrefillCPUImpl

    @staticmethod
    def get_builder_cls() -> type[FlashPrefillCPUMetadataBuilder]:
        return FlashPrefillCPUMetadataBuilder


class FlashPrefillCPUMetadataBuilder(FlashPrefillBuilderMixin, CPUAttentionMetadataBuilder):
    pass


class FlashPrefillCPUImpl(CPUFlashPrefillImplMixin, CPUAttentionBackendImpl):
    def dense_reason(
        self, layer: Any, kv_cache: torch.Tensor, attn_metadata: CPUAttentionMetadata
    ) -> DenseReason | None:
        reason = super().dense_reason(layer, kv_cache, attn_metadata)
        if reason is not None:
            return reason
        if attn_metadata.use_sdpa_prefill:
            return DenseReason.CPU_ARCHITECTURE
        # [2, num_pages, G, page_size, D], a page of keys being stored by dimension inside.
        self._layouts = _layouts(attn_metadata.isa, kv_cache.shape[3], self.head_size, kv_cache.dtype)
        return DenseReason.KV_CACHE_LAYOUT if None in self._layouts else None

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        k_cache, v_cache = kv_cache.unbind(0)
        ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, attn_metadata.slot_mapping, attn_metadata.isa)

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (_by_token(cache, layout) for cache, layout in zip(kv_cache.unbind(0), self._layouts, strict=True))
        return k, v

    def forward_dense(self, layer, query, key, value, kv_cache, dense_metadata) -> torch.Tensor:
        # Without keys and values vLLM leaves the cache, already written, as it is.
        output = torch.empty_like(query)
        return self.vllm_forward(layer, query, None, None, kv_cache, dense_metadata, output)


def _by_token(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """[num_pages, G, page_size, D] as vLLM stores it, to a [num_pages, page_size, G, D] view."""
    if layout == "dims":
        num_pages, num_kv_heads, page_size, head_size = cache.shape
        cache = cache.view(num_pages, num_kv_heads, head_size, page_size).transpose(2, 3)
    return cache.transpose(1, 2)


@functools.cache
def _layouts(isa: str, page_size: int, head_size: int, dtype: torch.dtype) -> tuple[str | None, str | None]:
    def write(key, value, k_cache, v_cache, slots):
        ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, slots, isa)

    return written_as(write, page_size=page_size, head_size=head_size, dtype=dtype)
