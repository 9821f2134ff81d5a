"""FlashAttention's KV cache: how vLLM makes one, and the one of 0.10.0 and 0.12.0, which `forward` writes."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends import flash_attn

from vllm_flashprefill.backend.flash_attn_builder import FlashAttnBuilderMixin
from vllm_flashprefill.backend.flash_attn_impl import FlashAttnImplMixin


class FlashAttnCacheMetadataBuilder(FlashAttnBuilderMixin, flash_attn.FlashAttentionMetadataBuilder):
    def new_cache(self, num_pages, page_size, num_kv_heads, head_size, dtype, device) -> torch.Tensor:
        backend = flash_attn.FlashAttentionBackend
        shape = backend.get_kv_cache_shape(num_pages, page_size, num_kv_heads, head_size)
        order = backend.get_kv_cache_stride_order()
        cache = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
        return cache.permute([order.index(dim) for dim in range(len(order))])


class FlashAttnCacheImplMixin(FlashAttnImplMixin):
    """[2, num_pages, page_size, G, D]."""

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        cache, slots = self.paged_kv(kv_cache), attn_metadata.slot_mapping
        how = (self.kv_cache_dtype, layer._k_scale, layer._v_scale)
        flash_attn.reshape_and_cache_flash(key, value, *cache, slots, *how)

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.unbind(0)
