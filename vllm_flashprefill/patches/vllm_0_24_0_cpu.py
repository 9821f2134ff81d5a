"""FlashPrefill in the CPU attention of vLLM 0.24.0 and newer, whose layer writes the cache before `forward`."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.patches.cpu_attn_cache import (
    CPUAttnCacheImplMixin,
    FlashPrefillCPUMetadataBuilder,
    HeadwiseCacheMixin,
)
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillCPUImpl(KVWrittenBeforeMixin, HeadwiseCacheMixin, CPUAttnCacheImplMixin, CPUAttentionBackendImpl):
    pass


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, CPUAttentionBackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
