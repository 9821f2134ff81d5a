"""FlashPrefill in the FlashAttention backend of vLLM 0.15.0 to 0.22.1, whose layer writes the cache."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.patches.flash_attn_cache import FlashAttnCacheImplMixin, FlashAttnCacheMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnImpl(KVWrittenBeforeMixin, FlashAttnCacheImplMixin, FlashAttentionImpl):
    pass


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashAttnCacheMetadataBuilder
