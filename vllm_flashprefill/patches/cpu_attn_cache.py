"""The KV cache of CPU_ATTN in vLLM 0.12.0 and newer: pages of each head, which vLLM's kernel orders as it likes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_flashprefill.backend.attention_impl import CPUFlashPrefillImplMixin, written_as
from vllm_flashprefill.routing import DenseReason


class CPUAttnCacheImplMixin(CPUFlashPrefillImplMixin):
    """Goes before a version's CPUAttentionBackendImpl, whose class says how keys and values lie in the cache."""

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        reason = super().dense_reason(layer, kv_cache, attn_metadata)
        if reason is not None:
            return reason
        if attn_metadata.use_sdpa_prefill:
            return DenseReason.CPU_ARCHITECTURE
        isa = getattr(attn_metadata, "isa", None) or self.isa
        page_size = self.split_kv(kv_cache)[0].shape[2]
        self._layouts = _layouts(isa, page_size, self.head_size, kv_cache.dtype)
        return DenseReason.KV_CACHE_LAYOUT if None in self._layouts else None

    def split_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [num_pages, G, page_size, D] each."""
        raise NotImplementedError

    def paged_kv(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (_by_token(cache, layout) for cache, layout in zip(self.split_kv(kv_cache), self._layouts, strict=True))
        return k, v

    def forward_dense(self, layer, query, key, value, kv_cache, dense_metadata) -> torch.Tensor:
        # Without keys and values vLLM leaves the cache, already written, as it is.
        output = torch.empty_like(query)
        return self.vllm_forward(layer, query, None, None, kv_cache, dense_metadata, output)


def _by_token(cache: torch.Tensor, layout: str) -> torch.Tensor:
    """[num_pages, G, page_size, D] as vLLM stores it, to a [num_pages, page_size, G, D] view."""
    if layout == "dims":
        num_pages, num_kv_heads, page_size, head_size = cache.shape
        cache = cache.view(num_pages, num_kv_heads, head_size, page_size).transpose(2, 3)
    return cache.transpose(1, 2)


@functools.cache
def _layouts(isa: str, page_size: int, head_size: int, dtype: torch.dtype) -> tuple[str | None, str | None]:
    takes_scales = "k_scale" in inspect.signature(ops.cpu_attn_reshape_and_cache).parameters
    scales = dict(k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto") if takes_scales else {}

    def write(key, value, k_cache, v_cache, slots):
        ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, slots, isa, **scales)

    return written_as(write, page_size=page_size, head_size=head_size, dtype=dtype)
