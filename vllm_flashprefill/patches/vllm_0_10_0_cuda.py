"""FlashPrefill in vLLM 0.10.0's FlashAttention backend."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_flashprefill.backend.builder import FlashPrefillBuilderMixin
from vllm_flashprefill.backend.cuda_impl import CUDAFlashPrefillImplMixin
from vllm_flashprefill.plan import StepPlan


class FlashPrefillCUDABackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[FlashPrefillCUDAImpl]:
        return FlashPrefillCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashPrefillCUDAMetadataBuilder]:
        return FlashPrefillCUDAMetadataBuilder


class FlashPrefillCUDAMetadataBuilder(FlashPrefillBuilderMixin, FlashAttentionMetadataBuilder):
    def build_dense(self, part: Any, plan: StepPlan) -> Any:
        # The schedule of the whole batch lies in the buffer that full CUDA graphs read; this one must not.
        use_full_cuda_graph = self.use_full_cuda_graph
        self.use_full_cuda_graph = False
        try:
            return super().build_dense(part, plan)
        finally:
            self.use_full_cuda_graph = use_full_cuda_graph


class FlashPrefillCUDAImpl(CUDAFlashPrefillImplMixin, FlashAttentionImpl):
    pass
