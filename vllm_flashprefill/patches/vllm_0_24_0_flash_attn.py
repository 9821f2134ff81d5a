"""FlashPrefill in the FlashAttention backend of vLLM 0.23.0 to 0.25.1: a cache of [pages, 2, page size, G, D]."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.backend.flash_attn_impl import FlashAttnImplMixin
from vllm_flashprefill.backend.prompt_lengths import PREPARED_INPUTS, watch
from vllm_flashprefill.patches.flash_attn_cache import FlashAttnCacheMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnMetadataBuilder(FlashAttnCacheMetadataBuilder):
    def watch_model_runners(self) -> None:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        super().watch_model_runners()
        watch(GPUModelRunner, PREPARED_INPUTS)


class FlashPrefillFlashAttnImpl(KVWrittenBeforeMixin, FlashAttnImplMixin, FlashAttentionImpl):
    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kv_cache.unbind(1)


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashPrefillFlashAttnMetadataBuilder
