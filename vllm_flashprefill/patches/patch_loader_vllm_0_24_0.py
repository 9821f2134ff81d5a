"""Registers FlashPrefill with vLLM 0.24.0 when imported.

Target: the class paths of CPU_ATTN, FLASH_ATTN and CUSTOM in ``vllm.v1.attention.backends.registry``.
Why: the platform answers with these names, so every layer for which vLLM would choose its CPU or FlashAttention
backend gets ours, which subclasses it; layers for which it chooses another backend are untouched.
How: ``register_backend(..., class_path=)``. CUSTOM makes ``--attention-backend CUSTOM`` work too.
Can go: with support for 0.24.0.
"""

from __future__ import annotations

from vllm_flashprefill.patches import registration
from vllm_flashprefill.patches.registration import revert

__all__ = ["load", "revert"]

CPU_BACKEND = "vllm_flashprefill.patches.vllm_0_24_0_cpu.FlashPrefillCPUBackend"
CUDA_BACKEND = "vllm_flashprefill.patches.vllm_0_24_0_cuda.FlashPrefillCUDABackend"
CLASS_PATHS = {"CPU_ATTN": CPU_BACKEND, "FLASH_ATTN": CUDA_BACKEND, "CUSTOM": CUDA_BACKEND}


def load() -> None:
    """Register in this process, and in those it starts. Idempotent; importing this module calls it."""
    registration.load(__name__, _apply)


def _apply() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for name in CLASS_PATHS:
        member = AttentionBackendEnum[name]
        if member.is_overridden():
            raise RuntimeError(f"vLLM's {name} backend is already replaced by {member.get_path()}; load only one")
    for name, class_path in CLASS_PATHS.items():
        registration.on_revert(AttentionBackendEnum[name].clear_override)
        register_backend(AttentionBackendEnum[name], class_path=class_path)
    _cached_get_attn_backend.cache_clear()
    registration.on_revert(_cached_get_attn_backend.cache_clear)


load()
