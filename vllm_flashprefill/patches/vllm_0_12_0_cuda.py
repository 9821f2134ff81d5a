"""FlashPrefill in vLLM 0.12.0's FlashAttention backend."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import AttentionCGSupport

from vllm_flashprefill.patches.flash_attn_cache import FlashAttentionCacheBuilderMixin, FlashAttentionCacheImplMixin


class FlashPrefillCUDABackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashPrefillCUDAImpl]:
        return FlashPrefillCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashPrefillCUDAMetadataBuilder]:
        return FlashPrefillCUDAMetadataBuilder


class FlashPrefillCUDAMetadataBuilder(FlashAttentionCacheBuilderMixin, FlashAttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
        # With FlashAttention 3 vLLM's own class allows full graphs of mixed batches.
        support = super().get_cudagraph_support(*args, **kwargs)
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)


class FlashPrefillCUDAImpl(FlashAttentionCacheImplMixin, FlashAttentionImpl):
    dense_forward_writes_kv = False
