"""The CUDA metadata builder: keeps sparse steps out of CUDA graphs, and compiles the kernels before serving."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.builder import NO_STEP, FlashPrefillBuilderMixin
from vllm_flashprefill.backend.cuda_impl import CUDAFlashPrefillImplMixin
from vllm_flashprefill.checks import DTYPES, PAGE_SIZE_MULTIPLE
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest, StepPlan

logger = logging.getLogger("vllm.flashprefill")

# What the kernels were compiled for in this process.
_compiled: set[tuple] = set()


class CUDAFlashPrefillBuilderMixin(FlashPrefillBuilderMixin):
    """Goes before a version's FlashAttentionMetadataBuilder.

    A version's class says how that vLLM lays out a cache (`new_cache`), and lets no step with a sparse request
    into a full CUDA graph: what a graph replays is what was captured, which is vLLM's own attention.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if torch.device(self.device).type == "cuda":
            layers = self.vllm_config.compilation_config.static_forward_context.values()
            compile_kernels(
                (layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), CUDAFlashPrefillImplMixin)),
                self.new_cache,
                page_size=self.block_size,
                dtype=self.vllm_config.model_config.dtype,
                device=torch.device(self.device),
            )

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


def compile_kernels(
    impls: Iterable[CUDAFlashPrefillImplMixin],
    new_cache: Callable[..., torch.Tensor],
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the kernels once for each kind of layer, so that no request waits for a compiler.

    Lengths, thresholds and the batch are arguments of the kernels at run time; what they are compiled for is here.
    """
    if page_size % PAGE_SIZE_MULTIPLE or dtype not in DTYPES:
        return
    for impl in impls:
        config = impl.flashprefill_config
        constants = config.row_share, config.num_sink_blocks, config.num_window_blocks
        kind = (impl.num_heads, impl.num_kv_heads, impl.head_size, page_size, dtype, device, constants)
        if not impl.may_be_sparse or kind in _compiled:
            continue
        _compiled.add(kind)
        started = time.perf_counter()
        length = 256
        num_pages = -(-length // page_size)
        cache = new_cache(num_pages, page_size, impl.num_kv_heads, impl.head_size, dtype, device).zero_()
        table = torch.arange(num_pages, dtype=torch.int32, device=device)[None]
        q = torch.zeros(length, impl.num_heads, impl.head_size, dtype=dtype, device=device)
        flash_prefill_paged(
            q,
            KeyValues(*impl.paged_kv(cache), table),
            StepPlan((SparseRequest(0, 0, length, 0, length),)),
            config=config,
            softmax_scale=impl.scale,
            out=torch.empty_like(q),
            block_counts=torch.zeros(2, dtype=torch.int64, device=device),
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        logger.info(
            "FlashPrefill: compiled its kernels for %d/%d heads of %d, %s, pages of %d in %.1f s",
            *kind[:3],
            dtype,
            page_size,
            time.perf_counter() - started,
        )
