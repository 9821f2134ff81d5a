"""The CUDA impl, not yet connected to the kernels: choosing it is an error, not a silent dense run."""

from __future__ import annotations

from typing import Any

from vllm_flashprefill.backend.impl import FlashPrefillImplMixin


class CUDAFlashPrefillImplMixin(FlashPrefillImplMixin):
    """Goes before a version's FlashAttentionImpl."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "FlashPrefill is not connected to vLLM's CUDA engine in this release; it runs on the CPU engine. "
            "Unset FLASHPREFILL to serve this model dense"
        )
