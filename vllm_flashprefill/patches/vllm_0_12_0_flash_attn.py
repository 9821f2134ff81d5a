"""FlashPrefill in vLLM 0.12.0's FlashAttention backend."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_flashprefill.patches.flash_attn_cache import FlashAttnCacheImplMixin, FlashAttnCacheMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnImpl(FlashAttnCacheImplMixin, FlashAttentionImpl):
    pass


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashAttnCacheMetadataBuilder
