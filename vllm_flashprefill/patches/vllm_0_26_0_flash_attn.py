"""FlashPrefill in the FlashAttention backend of vLLM 0.26.0 to 0.33.0: a cache of [pages, G, page size, 2 * D]."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_flashprefill.patches import vllm_0_24_0_flash_attn
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnMetadataBuilder(vllm_0_24_0_flash_attn.FlashPrefillFlashAttnMetadataBuilder):
    def new_cache(self, num_pages, page_size, num_kv_heads, head_size, dtype, device) -> torch.Tensor:
        # Up to 0.28.0 the backend says how the dimensions lie, then the engine does.
        if hasattr(FlashAttentionBackend, "get_kv_cache_stride_order"):
            return super().new_cache(num_pages, page_size, num_kv_heads, head_size, dtype, device)
        order = self.vllm_config.cache_config.get_resolved_kv_cache_layout().layer_view_order
        shape = (num_pages, num_kv_heads, page_size, 2 * head_size)
        cache = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
        return cache.permute([order.index(dim) for dim in range(len(order))])


class FlashPrefillFlashAttnImpl(vllm_0_24_0_flash_attn.FlashPrefillFlashAttnImpl):
    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashPrefillFlashAttnMetadataBuilder
