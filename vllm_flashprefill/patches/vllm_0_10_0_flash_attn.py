"""FlashPrefill in the FlashAttention backend of vLLM 0.10.0 to 0.11.0."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_flashprefill.backend.flash_attn_builder import without_mixed_batches
from vllm_flashprefill.patches.flash_attn_cache import FlashAttnCacheImplMixin, FlashAttnCacheMetadataBuilder
from vllm_flashprefill.patches.registry import FlashPrefillBackendMixin


class FlashPrefillFlashAttnMetadataBuilder(FlashAttnCacheMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of vLLM 0.10.1 to 0.11.0, which asks nothing for each step.
        if hasattr(self, "cudagraph_support"):
            self.cudagraph_support = without_mixed_batches(self.cudagraph_support)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        metadata = super().build(*args, **kwargs)
        step = getattr(metadata, "flashprefill", None)
        self._has_sparse = step is not None and bool(step.plan.sparse)
        return metadata

    def can_run_in_cudagraph(self, common_attn_metadata: Any) -> bool:
        # Asked after the step's `build`; False makes vLLM run the step without its full graph.
        return not self._has_sparse and super().can_run_in_cudagraph(common_attn_metadata)


class FlashPrefillFlashAttnImpl(FlashAttnCacheImplMixin, FlashAttentionImpl):
    dense_forward_writes_kv = True


class FlashPrefillFlashAttnBackend(FlashPrefillBackendMixin, FlashAttentionBackend):
    flashprefill_impl = FlashPrefillFlashAttnImpl
    flashprefill_builder = FlashPrefillFlashAttnMetadataBuilder
