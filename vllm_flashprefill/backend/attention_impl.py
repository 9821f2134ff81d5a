"""The part of the attention impl that no vLLM version changes: who runs sparse, and how."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.builder import FlashPrefillStep
from vllm_flashprefill.backend.density_guard import DensityGuard
from vllm_flashprefill.backend.device_counts import LayerCounts, NoCounts, device_counts
from vllm_flashprefill.backend.layer_routing import (
    has_e4m3_cache,
    impl_dense_reason,
    layer_config,
    layer_dense_reason,
    say_quantised_cache,
)
from vllm_flashprefill.config import FlashPrefillConfig, strict
from vllm_flashprefill.counters import recorder
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.key_values import KeyValues, codes, is_e4m3
from vllm_flashprefill.routing import DenseReason

logger = logging.getLogger("vllm.flashprefill")


class FlashPrefillImplMixin:
    """Goes before vLLM's attention impl class; `forward` sends a step with sparse requests to `forward_sparse`.

    A layer that must be dense, and a step with no sparse request, is vLLM's own `forward`, untouched. A version's
    class says how its cache looks (`paged_kv`), and how it is written (`write_kv`, or `KVWrittenBeforeMixin`).

    Attributes:
        takes_e4m3: whether the cache of a sparse layer may be in e4m3.
        dense_forward_writes_kv: whether vLLM's `forward` must be given keys and values, which it then writes again.
        self_check_failed: whether this kind of layer got something other than vLLM's own attention at alpha 0.
    """

    takes_e4m3 = False
    dense_forward_writes_kv = False
    self_check_failed = False
    # Where the kernels' scratch comes from; the CPU's stages allocate theirs.
    _workspace: Workspace | None = None
    # Made at the layer's first sparse step, which knows the device.
    _counts: LayerCounts | NoCounts | None = None
    _density_guard: DensityGuard | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self.is_draft = in_draft_model()
        vllm_config = get_current_vllm_config()
        config = FlashPrefillConfig.from_vllm(vllm_config)
        self.flashprefill_config = layer_config(self, config, vllm_config.cache_config)
        say_quantised_cache(self, vllm_config.cache_config)
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
        output: torch.Tensor | None = None,
        *scales: torch.Tensor | None,
        **named_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        if attn_metadata is not None and self._is_sparse(layer, query, kv_cache, attn_metadata):
            attend = self.forward_sparse
        else:
            attend = super().forward
        if scales or named_scales:
            return attend(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        # Unpacking nothing would double what this adds to a dense layer.
        return attend(layer, query, key, value, kv_cache, attn_metadata, output)

    def _is_sparse(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any) -> bool:
        """Whether this step has sparse requests for this layer; counts its tokens that are dense."""
        step = getattr(attn_metadata, "flashprefill", None)
        if not self._dense_reason_known:
            self._dense_reason = self._first_reason(layer, query, kv_cache, attn_metadata)
            self._dense_reason_known = True
        reason = self._dense_reason
        if reason is None and step is None:
            reason = getattr(attn_metadata, "flashprefill_reason", DenseReason.NOT_PLANNED)
        if reason is not None:
            if step is not None:
                num_tokens = step.plan.num_tokens
            # Rows of padding may follow the batch's own.
            elif (num_tokens := getattr(attn_metadata, "num_actual_tokens", None)) is None:
                num_tokens = query.shape[0]
            recorder().add_dense(reason, num_tokens)
            return False
        plan = step.plan
        if plan.dense_tokens:
            add_dense = recorder().add_dense
            for request_reason, tokens in plan.dense_tokens.items():
                add_dense(request_reason, tokens)
        if not plan.sparse:
            return False
        if self._counts is None:
            self._counts = device_counts(query.device).new_layer()
            self._density_guard = DensityGuard(self._counts.arrived, self.num_heads)
        if self._density_guard.is_dense(plan, self.flashprefill_config):
            recorder().add_dense(DenseReason.DENSITY, plan.num_sparse_tokens)
            return False
        return True

    @property
    def always_dense(self) -> bool | None:
        """Whether this layer is dense in every step; None until it has seen its cache."""
        return self._dense_reason is not None if self._dense_reason_known else None

    def _first_reason(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any
    ) -> DenseReason | None:
        """Why this layer is always dense, or None, now that its cache is seen for the first time."""
        try:
            reason = self.dense_reason(layer, kv_cache, attn_metadata)
            k_cache = kv_cache if reason is not None else self.paged_kv(kv_cache)[0]
        except Exception as error:
            if strict():
                raise
            shape = tuple(kv_cache.shape)
            logger.error("FlashPrefill: a layer stays dense, since its cache is %s: %s", shape, error)
            return DenseReason.SELF_CHECK
        is_right = is_e4m3(k_cache) if has_e4m3_cache(self) else k_cache.dtype == query.dtype
        if reason is None and not is_right:
            return DenseReason.DTYPE
        if reason is None and k_cache.shape[2:] != (self.num_kv_heads, self.head_size):
            return DenseReason.KV_CACHE_LAYOUT
        return reason

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
                of padding, at the end, belong to no request. The query is in e4m3 where vLLM's layer quantises it.
            scales, named_scales: of a quantised output, which vLLM's own attention refuses.
        """
        if any(scale is not None for scale in (*scales, *named_scales.values())):
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        step: FlashPrefillStep = attn_metadata.flashprefill
        q = _by_head(query, self.num_heads, self.head_size)
        key = _by_head(key, self.num_kv_heads, self.head_size)
        value = _by_head(value, self.num_kv_heads, self.head_size)
        out = torch.empty_like(q) if output is None else _by_head(output, self.num_heads, self.head_size)

        # The whole batch first: a request may read pages that another request of this step writes.
        self.write_kv(layer, key, value, kv_cache, attn_metadata)
        if step.dense_metadata is not None:
            rows = step.dense_rows
            together = isinstance(rows, slice)
            # PyTorch takes no rows of e4m3 by their numbers.
            part = q[rows] if together else codes(q)[rows].view(q.dtype)
            part_out = out[rows] if together else out.new_empty(part.shape)
            kv = (key[rows], value[rows]) if self.dense_forward_writes_kv else (None, None)
            self.forward_dense(layer, part, *kv, kv_cache, step.dense_metadata, part_out)
            if not together:
                out[rows] = part_out
        flash_prefill_paged(
            q,
            self.key_values(layer, kv_cache, step.block_table),
            step.plan,
            config=self.flashprefill_config,
            softmax_scale=self.scale,
            q_scale=layer._q_scale if is_e4m3(q) else None,
            sinks=getattr(self, "sinks", None),
            out=out,
            block_counts=self._counts.blocks,
            workspace=self._workspace,
            mark=self._counts.next_mark(),
        )
        self._counts.step_done(step.plan, self.num_heads)
        return out.view(query.shape) if output is None else output

    def key_values(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor | None) -> KeyValues:
        scales = (layer._k_scale, layer._v_scale) if has_e4m3_cache(self) else ()
        return KeyValues(*self.paged_kv(kv_cache), block_table, *scales)

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
        if self.is_draft:
            return DenseReason.DRAFT
        if self.self_check_failed:
            return DenseReason.SELF_CHECK
        return layer_dense_reason(self, getattr(layer, "layer_name", ""), self.flashprefill_config)

    def never_sparse(self) -> bool:
        """Whether this layer is dense whatever its cache and the steps are."""
        return self.is_draft or impl_dense_reason(self) is not None

    def write_kv(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any
    ) -> None:
        """Write this step's keys and values, [tokens or more, G, D] each, into the cache.

        A version's class must say how: what is left out here is attended to as it was before the step.
        """
        raise NotImplementedError

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the cache as [num_pages, page_size, G, D] views."""
        raise NotImplementedError


def _by_head(x: torch.Tensor, num_heads: int, head_size: int) -> torch.Tensor:
    """[tokens, heads, D] or [tokens, heads * D], as the former."""
    return x if x.dim() == 3 else x.view(-1, num_heads, head_size)


class KVWrittenBeforeMixin:
    """Goes before `FlashPrefillImplMixin` where vLLM's layer has written the cache, by `do_kv_cache_update`."""

    def write_kv(self, *args: Any) -> None:
        pass


def in_draft_model() -> bool:
    """Whether vLLM is making the layers of a draft model, which it then tags."""
    # Where this module is not imported there is no tag; in 0.10.0's CPU engine it cannot be.
    tag = getattr(sys.modules.get("vllm.compilation.backends"), "model_tag", "")
    return tag.endswith("_head") or tag in ("draft_model", "extract_hidden_states")
