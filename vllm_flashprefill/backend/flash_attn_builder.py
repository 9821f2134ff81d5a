"""The metadata builder for FlashAttention: keeps sparse steps out of CUDA graphs, and warms the kernels up."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from vllm_flashprefill.backend.builder import NO_STEP, FlashPrefillBuilderMixin
from vllm_flashprefill.backend.layer_routing import has_e4m3_cache
from vllm_flashprefill.backend.self_check import check_layers, compared_on_gpu
from vllm_flashprefill.backend.warmup import compile_kernels
from vllm_flashprefill.plan import StepPlan

logger = logging.getLogger("vllm.flashprefill")


class FlashAttnBuilderMixin(FlashPrefillBuilderMixin):
    """Goes before a version's FlashAttentionMetadataBuilder.

    No step with a sparse request is let into a full CUDA graph: what a graph replays is what was captured, which is
    vLLM's own attention.
    """

    def prepare_layers(self) -> None:
        self.append_heads = max((layer.impl.num_heads for layer in self.own_layers()), default=None)
        for layer in self.own_layers():
            if has_e4m3_cache(layer.impl) and not layer.impl.never_sparse():
                _say_scales(layer)
        if torch.device(self.device).type == "cuda":
            compile_kernels(
                (layer.impl for layer in self.own_layers()),
                self.new_cache,
                page_size=self.block_size,
                dtype=self.vllm_config.model_config.dtype,
                device=torch.device(self.device),
            )
            compared = compared_on_gpu()
            check_layers(self, (layer for layer in self.own_layers() if not compared or _is_new(layer.impl)))

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> Any:
        return without_mixed_batches(super().get_cudagraph_support(*args, **kwargs))

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


def _is_new(impl: Any) -> bool:
    """Whether layers like this were not among those that were compared."""
    return has_e4m3_cache(impl) or getattr(impl, "sinks", None) is not None


def _say_scales(layer: Any) -> None:
    scales = [getattr(layer, f"_{name}_scale_float", None) for name in "kv"]
    if scales == [1.0, 1.0] and not getattr(layer, "calculate_kv_scales", False):
        _say_no_scales()


@functools.cache
def _say_no_scales() -> None:
    logger.warning(
        "FlashPrefill: keys and values lie in e4m3 as they are (a scale of 1.0), since the checkpoint has no scales; "
        "see what that costs in accuracy"
    )


def without_mixed_batches(support: Any) -> Any:
    """vLLM's ``AttentionCGSupport``; with FlashAttention 3 its own class allows full graphs of mixed batches."""
    return min(support, type(support).UNIFORM_BATCH, key=lambda level: level.value)
