"""The impl for FlashAttention: the layers that the kernels take, and the scratch that they share."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin
from vllm_flashprefill.backend.layer_routing import has_e4m3_cache, impl_dense_reason
from vllm_flashprefill.checks import DTYPES, HEAD_SIZES, PAGE_SIZE_MULTIPLE
from vllm_flashprefill.kernels.workspace import scratch_bytes, shared_workspace
from vllm_flashprefill.key_values import FP8_DTYPES
from vllm_flashprefill.routing import DenseReason

logger = logging.getLogger("vllm.flashprefill")


class FlashAttnImplMixin(FlashPrefillImplMixin):
    """Goes before a version's FlashAttentionImpl.

    Attributes:
        may_be_sparse: whether the kernels take this layer, as far as is known before it has a cache.
        kernels_failed: whether they raised when they were warmed up for this kind of layer.
    """

    takes_e4m3 = True
    kernels_failed = False

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
                num_pieces=self.flashprefill_config.num_pieces,
                fp8_products=self.flashprefill_config.compute_dtype == "fp8",
                device=device,
            )
        )

    def never_sparse(self) -> bool:
        return super().never_sparse() or not self.may_be_sparse or self.kernels_failed

    def dense_reason(self, layer: Any, kv_cache: torch.Tensor, attn_metadata: Any) -> DenseReason | None:
        if (reason := super().dense_reason(layer, kv_cache, attn_metadata)) is not None:
            return reason
        if self.head_size not in HEAD_SIZES:
            return DenseReason.HEAD_SIZE
        if kv_cache.dtype not in (FP8_DTYPES if has_e4m3_cache(self) else DTYPES):
            return DenseReason.DTYPE
        if has_e4m3_cache(self) and not self._scales_fit(layer):
            return DenseReason.QUANTIZED_KV_CACHE
        k_cache, v_cache = self.paged_kv(kv_cache)
        if k_cache.shape[1] % PAGE_SIZE_MULTIPLE or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
            return DenseReason.KV_CACHE_LAYOUT
        return DenseReason.KERNEL_FAILED if self.kernels_failed else None

    def _scales_fit(self, layer: Any) -> bool:
        """Whether the scales of its e4m3 cache are such as the kernels take; what they are is said where not."""
        for name in ("_q_scale", "_k_scale", "_v_scale"):
            scale = getattr(layer, name)
            if scale.dtype != torch.float32 or (scale.numel() != 1 and scale.shape != (self.num_kv_heads,)):
                _warn_scale(name[1:], tuple(scale.shape), scale.dtype, self.num_kv_heads)
                return False
        return True


@functools.cache
def _warn_scale(name: str, shape: tuple[int, ...], dtype: torch.dtype, num_kv_heads: int) -> None:
    logger.warning(
        "FlashPrefill: layers with a %s of shape %s in %s stay dense: the kernels take one of float32, or one for each "
        "of %d KV heads",
        name,
        shape,
        dtype,
        num_kv_heads,
    )
