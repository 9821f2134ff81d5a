"""FlashAttention's KV cache: how vLLM makes one, and the one of 0.10.0 to 0.14, which `forward` writes."""

from __future__ import annotations

import dataclasses
from typing import Any

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

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """The step's metadata for the next of several groups of layers, which have caches of their own.

        vLLM 0.14 and newer ask for it.
        """
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        step = getattr(metadata, "flashprefill", None)
        if step is not None:
            dense_metadata = step.dense_metadata
            if dense_metadata is not None:
                dense_metadata = super().update_block_table(
                    dense_metadata, blk_table[step.dense_requests], slot_mapping[step.dense_rows]
                )
            updated.flashprefill = dataclasses.replace(step, block_table=blk_table, dense_metadata=dense_metadata)
        return updated


class FlashAttnCacheImplMixin(FlashAttnImplMixin):
    """[2, num_pages, page_size, G, D]."""

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        cache, slots = self.paged_kv(kv_cache), attn_metadata.slot_mapping
        how = (self.kv_cache_dtype, layer._k_scale, layer._v_scale)
        flash_attn.reshape_and_cache_flash(key, value, *cache, slots, *how)

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.unbind(0)
