"""The CUDA impl: a step's sparse requests through the kernels, its dense ones through vLLM's FlashAttention."""

from __future__ import annotations

from typing import Any

import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.builder import FlashPrefillStep
from vllm_flashprefill.backend.device_counts import device_counts
from vllm_flashprefill.backend.impl import FlashPrefillImplMixin
from vllm_flashprefill.backend.routing import DenseReason, impl_dense_reason
from vllm_flashprefill.backend.stage_times import stage_times
from vllm_flashprefill.checks import DTYPES, HEAD_SIZES, PAGE_SIZE_MULTIPLE
from vllm_flashprefill.kernels.workspace import scratch_bytes, shared_workspace
from vllm_flashprefill.key_values import KeyValues


class CUDAFlashPrefillImplMixin(FlashPrefillImplMixin):
    """Goes before a version's FlashAttentionImpl.

    A version's class says how that vLLM writes the cache (`write_kv`) and how its cache looks (`paged_kv`).

    Attributes:
        dense_forward_writes_kv: whether vLLM's `forward` must be given keys and values, which it then writes again.
    """

    dense_forward_writes_kv = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self.may_be_sparse = impl_dense_reason(self) is None and self.head_size in HEAD_SIZES
        if not self.may_be_sparse:
            return
        # Layers are made before vLLM measures what memory is left for the cache, and on their worker's GPU.
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        vllm_config = get_current_vllm_config()
        self._workspace = shared_workspace(device)
        self._workspace.reserve(
            scratch_bytes(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                max_query_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                max_seq_len=vllm_config.model_config.max_model_len,
                device=device,
            )
        )

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        reason = super().dense_reason(layer, kv_cache, attn_metadata)
        if reason is not None:
            return reason
        if self.head_size not in HEAD_SIZES:
            return DenseReason.HEAD_SIZE
        if kv_cache.dtype not in DTYPES:
            return DenseReason.DTYPE
        k_cache, v_cache = self.paged_kv(kv_cache)
        if k_cache.shape[1] % PAGE_SIZE_MULTIPLE or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
            return DenseReason.KV_CACHE_LAYOUT
        return None

    def forward_sparse(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        step: FlashPrefillStep,
        output: torch.Tensor | None = None,
        *scales: torch.Tensor | None,
        **named_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        if output is None or any(scale is not None for scale in (*scales, *named_scales.values())):
            # No output, or a quantised one: vLLM's FlashAttention takes neither and says so.
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)

        # The whole batch first: a request may read pages that another request of this step writes.
        self.write_kv(layer, key, value, kv_cache, attn_metadata)
        if step.dense_metadata is not None:
            self._forward_dense(layer, query, key, value, kv_cache, step, output)
        counts = device_counts(query.device)
        # Rows of padding, at the end of query and output, belong to no request.
        flash_prefill_paged(
            query,
            KeyValues(*self.paged_kv(kv_cache), step.block_table),
            step.plan,
            config=self.flashprefill_config,
            softmax_scale=self.scale,
            out=output,
            block_counts=counts.blocks,
            workspace=self._workspace,
            # Tests run this on CPU tensors, where there are no events to record.
            mark=stage_times(query.device).next_layer() if query.is_cuda else None,
        )
        counts.layer_done(step.plan, self.num_heads)
        return output

    def _forward_dense(self, layer, query, key, value, kv_cache, step: FlashPrefillStep, output) -> None:
        rows = step.dense_rows
        if self.dense_forward_writes_kv:
            key, value = key[rows], value[rows]
        else:
            key = value = None
        part = query[rows]
        together = isinstance(rows, slice)
        part_output = output[rows] if together else torch.empty_like(part)
        self.vllm_forward(layer, part, key, value, kv_cache, step.dense_metadata, part_output)
        if not together:
            output[rows] = part_output

    def write_kv(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any
    ) -> None:
        """Write this step's keys and values, [tokens or more, G, D] each, into the cache."""
        raise NotImplementedError

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the cache as [num_pages, page_size, G, D] views."""
        raise NotImplementedError
