"""FlashPrefill in vLLM 0.12.0's FlashAttention backend."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import AttentionCGSupport

from vllm_flashprefill.backend.cuda_builder import CUDAFlashPrefillBuilderMixin
from vllm_flashprefill.backend.cuda_impl import CUDAFlashPrefillImplMixin


class FlashPrefillCUDABackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashPrefillCUDAImpl]:
        return FlashPrefillCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashPrefillCUDAMetadataBuilder]:
        return FlashPrefillCUDAMetadataBuilder


class FlashPrefillCUDAMetadataBuilder(CUDAFlashPrefillBuilderMixin, FlashAttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        # With FlashAttention 3 vLLM's own class allows full graphs of mixed batches.
        support = super().get_cudagraph_support(*args, **kwargs)
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

    def new_cache(self, num_pages, page_size, num_kv_heads, head_size, dtype, device) -> torch.Tensor:
        shape = FlashAttentionBackend.get_kv_cache_shape(num_pages, page_size, num_kv_heads, head_size)
        order = FlashAttentionBackend.get_kv_cache_stride_order()
        cache = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
        return cache.permute([order.index(dim) for dim in range(len(order))])


class FlashPrefillCUDAImpl(CUDAFlashPrefillImplMixin, FlashAttentionImpl):
    dense_forward_writes_kv = False

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        flash_attn.reshape_and_cache_flash(
            key,
            value,
            *self.paged_kv(kv_cache),
            attn_metadata.slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_cache, v_cache = kv_cache.unbind(0)
        return k_cache, v_cache
