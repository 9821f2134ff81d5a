"""FlashPrefill in vLLM 0.12.0's CPU attention."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_flashprefill.patches.cpu_attn_cache import CPUAttnCacheImplMixin, FlashPrefillCPUMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillCPUImpl(CPUAttnCacheImplMixin, CPUAttentionBackendImpl):
    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        cache, slots = self.split_kv(kv_cache), attn_metadata.slot_mapping
        ops.cpu_attn_reshape_and_cache(key, value, *cache, slots, attn_metadata.isa)

    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.unbind(0)


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, CPUAttentionBackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
