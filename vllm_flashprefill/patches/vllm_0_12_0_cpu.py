"""FlashPrefill in the CPU attention of vLLM 0.11.1 to 0.22.1, whose `forward` writes a cache of [2, pages, ...]."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_flashprefill.patches.cpu_attn_cache import CPUAttnCacheImplMixin, FlashPrefillCPUMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillCPUImpl(CPUAttnCacheImplMixin, CPUAttentionBackendImpl):
    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.unbind(0)


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, CPUAttentionBackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
