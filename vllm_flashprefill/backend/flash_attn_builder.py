"""The metadata builder for FlashAttention: keeps sparse steps out of CUDA graphs, and warms the kernels up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm_flashprefill.backend.builder import NO_STEP, FlashPrefillBuilderMixin
from vllm_flashprefill.backend.flash_attn_impl import FlashAttnImplMixin
from vllm_flashprefill.backend.warmup import compile_kernels
from vllm_flashprefill.plan import StepPlan


class FlashAttnBuilderMixin(FlashPrefillBuilderMixin):
    """Goes before a version's FlashAttentionMetadataBuilder.

    No step with a sparse request is let into a full CUDA graph: what a graph replays is what was captured, which is
    vLLM's own attention. A version's class says how that vLLM lays out a cache (`new_cache`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if torch.device(self.device).type == "cuda":
            compile_kernels(
                self.own_impls(),
                self.new_cache,
                page_size=self.block_size,
                dtype=self.vllm_config.model_config.dtype,
                device=torch.device(self.device),
            )

    def own_impls(self) -> Iterator[FlashAttnImplMixin]:
        """Those of the layers that this builds metadata for; of all layers in vLLM 0.10.0, which does not say."""
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in getattr(self, "layer_names", layers):
            impl = getattr(layers.get(name), "impl", None)
            if isinstance(impl, FlashAttnImplMixin):
                yield impl

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> Any:
        # With FlashAttention 3 vLLM's own class allows full graphs of mixed batches.
        support = super().get_cudagraph_support(*args, **kwargs)
        return min(support, type(support).UNIFORM_BATCH, key=lambda level: level.value)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        metadata.flashprefill = NO_STEP
        return metadata

    def build_dense(self, part: Any, plan: StepPlan) -> Any:
        # The schedule of the whole batch lies in the buffer that full CUDA graphs read; this one must not. The
        # number of splits is a full graph's too.
        kept = self.use_full_cuda_graph, self.max_num_splits
        self.use_full_cuda_graph, self.max_num_splits = False, 0
        try:
            return super().build_dense(part, plan)
        finally:
            self.use_full_cuda_graph, self.max_num_splits = kept

    def new_cache(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """A KV cache as this vLLM makes it, with anything in it."""
        raise NotImplementedError
