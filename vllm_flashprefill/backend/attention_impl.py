"""The part of the attention impl that no vLLM version changes: who runs sparse, and how."""

from __future__ import annotations

from typing import Any

import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.builder import FlashPrefillStep
from vllm_flashprefill.backend.density_guard import DensityGuard
from vllm_flashprefill.backend.device_counts import LayerCounts, device_counts
from vllm_flashprefill.backend.layer_routing import layer_dense_reason
from vllm_flashprefill.backend.stage_times import stage_times
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.counters import recorder
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.routing import DenseReason


class FlashPrefillImplMixin:
    """Goes before vLLM's attention impl class; `forward` sends a step with sparse requests to `forward_sparse`.

    A layer that must be dense, and a step with no sparse request, is vLLM's own `forward`, untouched. A version's
    class says how its cache looks (`paged_kv`), and how it is written where that is done in `forward` (`write_kv`).

    Attributes:
        dense_forward_writes_kv: whether vLLM's `forward` must be given keys and values, which it then writes again.
    """

    dense_forward_writes_kv = False
    # Where the kernels' scratch comes from; the CPU's stages allocate theirs.
    _workspace: Workspace | None = None
    # Made at the layer's first sparse step, which knows the device.
    _counts: LayerCounts | None = None
    _density_guard: DensityGuard | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self.flashprefill_config = FlashPrefillConfig.from_vllm(get_current_vllm_config())
        self._dense_reason_known = False
        self._dense_reason: DenseReason | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        is_sparse = attn_metadata is not None and self._is_sparse(layer, query, kv_cache, attn_metadata)
        attend = self.forward_sparse if is_sparse else self.vllm_forward
        return attend(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    def _is_sparse(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any) -> bool:
        """Whether this step has sparse requests for this layer; counts its tokens that are dense."""
        step = getattr(attn_metadata, "flashprefill", None)
        if not self._dense_reason_known:
            self._dense_reason = self.dense_reason(layer, kv_cache, attn_metadata)
            self._dense_reason_known = True
        reason = self._dense_reason
        if reason is None and step is None:
            reason = DenseReason.NOT_PLANNED
        if reason is not None:
            # Rows of padding may follow the batch's own.
            num_tokens = getattr(attn_metadata, "num_actual_tokens", query.shape[0])
            recorder().add_dense(reason, num_tokens if step is None else step.plan.num_tokens)
            return False
        for request_reason, tokens in step.plan.dense_tokens.items():
            recorder().add_dense(request_reason, tokens)
        if not step.plan.sparse:
            return False
        if self._counts is None:
            self._counts = device_counts(query.device).new_layer()
            self._density_guard = DensityGuard(self._counts.arrived, self.num_heads)
        if self._density_guard.is_dense(step.plan, self.flashprefill_config):
            recorder().add_dense(DenseReason.DENSITY, step.plan.num_sparse_tokens)
            return False
        return True

    def forward_sparse(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
        *scales: torch.Tensor | None,
        **named_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sparse requests of a step through `flash_prefill_paged`, its dense ones through vLLM's `forward`.

        Args:
            query, key, value, output: [tokens or more, heads, D], or [tokens, heads * D], as of vLLM's `forward`; rows
                of padding, at the end, belong to no request.
            scales, named_scales: of a quantised output, which vLLM's own attention refuses.
        """
        if any(scale is not None for scale in (*scales, *named_scales.values())):
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        step: FlashPrefillStep = attn_metadata.flashprefill
        q = query.view(-1, self.num_heads, self.head_size)
        key, value = (x.view(-1, self.num_kv_heads, self.head_size) for x in (key, value))
        out = torch.empty_like(q) if output is None else output.view(q.shape)

        # The whole batch first: a request may read pages that another request of this step writes.
        self.write_kv(layer, key, value, kv_cache, attn_metadata)
        if step.dense_metadata is not None:
            rows = step.dense_rows
            together = isinstance(rows, slice)
            part = q[rows]
            part_out = out[rows] if together else torch.empty_like(part)
            kv = (key[rows], value[rows]) if self.dense_forward_writes_kv else (None, None)
            self.forward_dense(layer, part, *kv, kv_cache, step.dense_metadata, part_out)
            if not together:
                out[rows] = part_out
        flash_prefill_paged(
            q,
            KeyValues(*self.paged_kv(kv_cache), step.block_table),
            step.plan,
            config=self.flashprefill_config,
            softmax_scale=self.scale,
            out=out,
            block_counts=self._counts.blocks,
            workspace=self._workspace,
            mark=stage_times(q.device).next_layer(),
        )
        self._counts.step_done(step.plan, self.num_heads)
        return out.view(query.shape) if output is None else output

    def forward_dense(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        dense_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """vLLM's own attention for the dense requests of a mixed step; query and output are [their tokens, H, D]."""
        self.vllm_forward(layer, query, key, value, kv_cache, dense_metadata, output)

    def vllm_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of the vLLM class that this mixin goes before."""
        return super().forward(*args, **kwargs)

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        """Why this layer is always dense, or None. Asked at its first step."""
        return layer_dense_reason(self, getattr(layer, "layer_name", ""), self.flashprefill_config)

    def write_kv(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any
    ) -> None:
        """Write this step's keys and values, [tokens or more, G, D] each, into the cache.

        Nothing where vLLM's layer has, by `do_kv_cache_update`.
        """

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the cache as [num_pages, page_size, G, D] views."""
        raise NotImplementedError
