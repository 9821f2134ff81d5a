"""FlashPrefill in vLLM 0.24.0's CPU attention."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.patches.cpu_attn_cache import CPUAttnCacheImplMixin, FlashPrefillCPUMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillCPUImpl(KVWrittenBeforeMixin, CPUAttnCacheImplMixin, CPUAttentionBackendImpl):
    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [num_pages, G, page_size, 2 * D] in shape; in memory a head's keys of a page, then its values.
        num_pages, num_kv_heads, page_size, _ = kv_cache.shape
        return kv_cache.view(num_pages, num_kv_heads, 2 * page_size, -1).chunk(2, dim=2)


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, CPUAttentionBackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
