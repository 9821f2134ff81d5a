"""Registers FlashPrefill with vLLM 0.10.0 (engine V1) when imported.

Target: ``get_attn_backend_cls`` of the current platform's class.
Why: this version has no backend registry; what this method answers is the class that every layer gets.
How: where vLLM answers its CPU or FlashAttention backend of engine V1, ours, which subclasses it, is answered.
Can go: with support for 0.10.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_flashprefill.patches import engine_checks, registration, undo
from vllm_flashprefill.patches.registration import revert

__all__ = ["load", "revert"]

THEIRS, OURS = "vllm.v1.attention.backends", "vllm_flashprefill.patches.vllm_0_10_0"
CLASS_PATHS = {
    f"{THEIRS}.cpu_attn.TorchSDPABackend": f"{OURS}_cpu.FlashPrefillCPUBackend",
    f"{THEIRS}.flash_attn.FlashAttentionBackend": f"{OURS}_flash_attn.FlashPrefillFlashAttnBackend",
}


def load() -> None:
    """Register in this process, and in those it starts. Idempotent; importing this module calls it."""
    registration.load(__name__, _apply)


def _apply() -> None:
    from vllm import envs
    from vllm.attention.selector import _cached_get_attn_backend
    from vllm.platforms import current_platform

    def require_v1(vllm_config: Any = None) -> None:
        if not envs.VLLM_USE_V1:
            raise RuntimeError(
                "FlashPrefill serves vLLM 0.10.0's V1 engine only; unset VLLM_USE_V1=0 or the option that needs V0"
            )

    def answer_ours(original: Any) -> Any:
        @functools.wraps(original)
        def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
            class_path = original(*args, **kwargs)
            return CLASS_PATHS.get(class_path, class_path)

        return classmethod(get_attn_backend_cls)

    require_v1()
    undo.wrap(type(current_platform), "get_attn_backend_cls", answer_ours)
    engine_checks.on_engine_config(require_v1)
    _cached_get_attn_backend.cache_clear()
    undo.on_revert(_cached_get_attn_backend.cache_clear)


load()
