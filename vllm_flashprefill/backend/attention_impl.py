"""The part of the attention impl that no vLLM version changes: who runs sparse, and the CPU's sparse path."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_flashprefill.backend.builder import FlashPrefillStep
from vllm_flashprefill.backend.cpu_attention import sparse_attention_cpu
from vllm_flashprefill.backend.layer_routing import layer_dense_reason
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.counters import recorder
from vllm_flashprefill.plan import SparseRequest
from vllm_flashprefill.reference import gather_pages, select_blocks_ref
from vllm_flashprefill.routing import DenseReason


class FlashPrefillImplMixin:
    """Goes before vLLM's attention impl class; `forward` sends sparse requests to `forward_sparse`.

    A layer that must be dense, and a step with no sparse request, is vLLM's own `forward`, untouched.
    """

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
        if attn_metadata is None:
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
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
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        for request_reason, tokens in step.plan.dense_tokens.items():
            recorder().add_dense(request_reason, tokens)
        if not step.plan.sparse:
            return self.vllm_forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        return self.forward_sparse(layer, query, key, value, kv_cache, attn_metadata, step, *args, **kwargs)

    def vllm_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of the vLLM class that this mixin goes before."""
        return super().forward(*args, **kwargs)

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        """Why this layer is always dense, or None. Asked at its first step."""
        return layer_dense_reason(self, getattr(layer, "layer_name", ""), self.flashprefill_config)


class CPUFlashPrefillImplMixin(FlashPrefillImplMixin):
    """The four stages on the CPU, in PyTorch.

    A version's class says how that vLLM writes the cache (`write_kv`), how its cache looks (`paged_kv`) and how
    it runs the dense requests (`forward_dense`).
    """

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
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        q = query.view(-1, self.num_heads, self.head_size)
        key = key.view(-1, self.num_kv_heads, self.head_size)
        value = value.view(-1, self.num_kv_heads, self.head_size)
        out = torch.empty_like(q) if output is None else output.view(q.shape)

        # The whole batch first: a request may read pages that another request of this step writes.
        self.write_kv(layer, key, value, kv_cache, attn_metadata)
        if step.dense_metadata is not None:
            rows = step.dense_rows
            out[rows] = self.forward_dense(layer, q[rows], key[rows], value[rows], kv_cache, step.dense_metadata)
        k_pages, v_pages = self.paged_kv(kv_cache)
        for request in step.plan.sparse:
            pages = step.block_table[request.index]
            out[request.query_slice] = self._attend_request(q[request.query_slice], k_pages, v_pages, pages, request)
        return out.view(query.shape) if output is None else output

    def _attend_request(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        pages: torch.Tensor,
        request: SparseRequest,
    ) -> torch.Tensor:
        config = self.flashprefill_config
        started = time.perf_counter()
        k = gather_pages(k_pages, pages, request.seq_len)
        mask = select_blocks_ref(
            q,
            k,
            context_len=request.context_len,
            prompt_len=request.prompt_len,
            config=config,
            softmax_scale=self.scale,
        )
        selected = time.perf_counter()
        result = sparse_attention_cpu(
            q,
            k,
            gather_pages(v_pages, pages, request.seq_len),
            mask,
            context_len=request.context_len,
            block_size=config.block_size,
            softmax_scale=self.scale,
        )
        recorder().add_sparse(
            request.query_len,
            kept_blocks=int(mask.sum()),
            visible_blocks=request.visible_blocks * self.num_heads,
            selection=selected - started,
            attention=time.perf_counter() - selected,
        )
        return result

    def write_kv(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any
    ) -> None:
        """Write this step's keys and values, [tokens, G, D] each, into the cache."""
        raise NotImplementedError

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the cache as [num_pages, page_size, G, D] views."""
        raise NotImplementedError

    def forward_dense(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        dense_metadata: Any,
    ) -> torch.Tensor:
        """vLLM's own attention for the dense requests of a mixed step: [tokens, H, D] to the same shape."""
        raise NotImplementedError


def written_as(
    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    *,
    page_size: int,
    head_size: int,
    dtype: torch.dtype,
) -> tuple[str | None, str | None]:
    """How vLLM's cache write orders a page of one head, found by writing one: vLLM does not say.

    Args:
        write: called with key and value [page_size, 1, D], caches [1, 1, page_size, D] and slots [page_size].

    Returns:
        for keys and for values: "tokens" where the page is [page_size, D], "dims" where it is [D, page_size],
        None where it is something else.
    """
    token = torch.arange(page_size)[:, None].expand(page_size, head_size)
    dim = torch.arange(head_size)[None, :].expand(page_size, head_size)
    found: list[str | None] = []
    readings = []
    # Codes of small integers, which every cache dtype holds exactly.
    for code in (token % 64, dim % 64, token // 64, dim // 64):
        rows = code[:, None, :].to(dtype).contiguous()
        k_cache = torch.full((1, 1, page_size, head_size), -1.0, dtype=dtype)
        v_cache = k_cache.clone()
        write(rows, rows.clone(), k_cache, v_cache, torch.arange(page_size))
        readings.append((k_cache.flatten().long(), v_cache.flatten().long()))
    for cache in (0, 1):
        token_low, dim_low, token_high, dim_high = (reading[cache] for reading in readings)
        position = (token_low + 64 * token_high) * head_size + dim_low + 64 * dim_high
        if torch.equal(position, torch.arange(page_size * head_size)):
            found.append("tokens")
        elif torch.equal(position.view(head_size, page_size).T.flatten(), torch.arange(page_size * head_size)):
            found.append("dims")
        else:
            found.append(None)
    return found[0], found[1]
