"""FlashPrefill in the CPU attention of vLLM 0.23.0, whose `forward` writes a cache of [pages, heads, ...]."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_flashprefill.patches.cpu_attn_cache import (
    CPUAttnCacheImplMixin,
    FlashPrefillCPUMetadataBuilder,
    HeadwiseCacheMixin,
)
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillCPUImpl(HeadwiseCacheMixin, CPUAttnCacheImplMixin, CPUAttentionBackendImpl):
    pass


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, CPUAttentionBackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
