"""FlashPrefill in vLLM 0.24.0's FlashAttention backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.backend.flash_attn_impl import FlashAttnImplMixin
from vllm_flashprefill.backend.prompt_lengths import PREPARED_INPUTS, watch
from vllm_flashprefill.device import upload
from vllm_flashprefill.patches.flash_attn_cache import FlashAttnCacheMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnMetadataBuilder(FlashAttnCacheMetadataBuilder):
    def watch_model_runners(self) -> None:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        super().watch_model_runners()
        watch(GPUModelRunner, PREPARED_INPUTS)

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """The step's metadata for the next of several groups of layers, which have caches of their own."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        step = getattr(metadata, "flashprefill", None)
        if step is not None:
            dense_metadata = step.dense_metadata
            if dense_metadata is not None:
                requests = upload(torch.from_numpy(step.plan.dense), blk_table.device)
                dense_metadata = super().update_block_table(
                    dense_metadata, blk_table[requests], slot_mapping[step.dense_rows]
                )
            updated.flashprefill = dataclasses.replace(step, block_table=blk_table, dense_metadata=dense_metadata)
        return updated


class FlashPrefillFlashAttnImpl(KVWrittenBeforeMixin, FlashAttnImplMixin, FlashAttentionImpl):
    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # [num_pages, 2, page_size, G, D].
        return kv_cache.unbind(1)


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashPrefillFlashAttnMetadataBuilder
