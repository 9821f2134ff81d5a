"""FlashPrefill in vLLM 0.10.0's CPU attention (engine V1)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    TorchSDPABackend,
    TorchSDPABackendImpl,
    TorchSDPAMetadata,
    TorchSDPAMetadataBuilderV1,
)

from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin
from vllm_flashprefill.backend.builder import FlashPrefillBuilderMixin
from vllm_flashprefill.checks import PAGE_SIZE_MULTIPLE
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin
from vllm_flashprefill.plan import StepPlan
from vllm_flashprefill.routing import DenseReason


class FlashPrefillCPUMetadataBuilder(FlashPrefillBuilderMixin, TorchSDPAMetadataBuilderV1):
    def prepare_layers(self) -> None:
        """Nothing: this builder knows a batch by what vLLM did with the requests before, not by what it is given."""

    def build_dense(self, part: Any, plan: StepPlan) -> TorchSDPAMetadata:
        # vLLM has put the requests in prefill first; `num_prompt_req` says how many they are.
        num_prompt_req = self.num_prompt_req
        self.num_prompt_req = int((plan.dense < num_prompt_req).sum())
        try:
            return super().build_dense(part, plan)
        finally:
            self.num_prompt_req = num_prompt_req


class FlashPrefillCPUImpl(FlashPrefillImplMixin, TorchSDPABackendImpl):
    dense_forward_writes_kv = True

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: TorchSDPAMetadata) -> DenseReason | None:
        if (reason := super().dense_reason(layer, kv_cache, attn_metadata)) is not None:
            return reason
        k_cache, _ = self._split(kv_cache)
        # Without intel_extension_for_pytorch the cache is packed for a decode kernel alone.
        if k_cache.dim() != 4 or k_cache.shape[2] % PAGE_SIZE_MULTIPLE:
            return DenseReason.KV_CACHE_LAYOUT
        return None

    def write_kv(self, layer, key, value, kv_cache, attn_metadata) -> None:
        cache, slots = self._split(kv_cache), attn_metadata.slot_mapping
        how = (self.kv_cache_dtype, layer._k_scale, layer._v_scale)
        self.paged_attn_impl.write_to_paged_cache(key, value, *cache, slots, *how)

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_cache, v_cache = self._split(kv_cache)
        return k_cache.transpose(1, 2), v_cache.transpose(1, 2)

    def forward_dense(self, layer, query, key, value, kv_cache, dense_metadata, output) -> None:
        # This `forward` takes no output to write to.
        output.copy_(self.vllm_forward(layer, query, key, value, kv_cache, dense_metadata).view(query.shape))

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [num_pages, G, page_size, D] each."""
        return self.paged_attn_impl.split_kv_cache(kv_cache, self.num_kv_heads, self.head_size)


class FlashPrefillCPUBackend(FlashPrefillBackendMixin, TorchSDPABackend):
    flashprefill_impl = FlashPrefillCPUImpl
    flashprefill_builder = FlashPrefillCPUMetadataBuilder
