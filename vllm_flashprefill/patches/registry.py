"""What the patches of different vLLM versions share: the backend class, and the loader where vLLM has a registry."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from vllm_flashprefill.patches import registration, undo


class FlashPrefillBackendMixin:
    """Goes before a vLLM backend class, and has it answer our impl and builder.

    Attributes:
        flashprefill_impl: goes before the impl class of the vLLM backend.
        flashprefill_builder: goes before its metadata builder class.
    """

    flashprefill_impl: type
    flashprefill_builder: type

    @classmethod
    def get_impl_cls(cls) -> type:
        return cls.flashprefill_impl

    @classmethod
    def get_builder_cls(cls) -> type:
        return cls.flashprefill_builder


def loader(module: str, attention: str) -> Callable[[], None]:
    """The `load` of a loader: registers in this process, and in those it starts. Idempotent; its import calls it.

    vLLM's registry then answers our classes for its CPU and FlashAttention backends, and for CUSTOM.

    Args:
        module: the loader's name; those of our backend classes are alike, with ``_cpu`` and ``_flash_attn``.
        attention: vLLM's package with the modules ``backends.registry`` and ``selector``.

    Raises (when called):
        RuntimeError: someone else has replaced one of them; and as of `registration.load`.
    """
    apply = functools.partial(_override_backends, attention, module.replace("patch_loader_", ""))
    return functools.partial(registration.load, module, apply)


def _override_backends(attention: str, classes: str) -> None:
    registry = importlib.import_module(f"{attention}.backends.registry")
    selector = importlib.import_module(f"{attention}.selector")
    flash_attn = f"{classes}_flash_attn.FlashPrefillFlashAttnBackend"
    class_paths = {"CPU_ATTN": f"{classes}_cpu.FlashPrefillCPUBackend", "FLASH_ATTN": flash_attn, "CUSTOM": flash_attn}
    members = registry.AttentionBackendEnum
    for name in class_paths:
        if members[name].is_overridden():
            raise RuntimeError(
                f"vLLM's {name} backend is already replaced by {members[name].get_path()}; load only one"
            )
    for name, class_path in class_paths.items():
        undo.on_revert(members[name].clear_override)
        registry.register_backend(members[name], class_path=class_path)
    selector._cached_get_attn_backend.cache_clear()
    undo.on_revert(selector._cached_get_attn_backend.cache_clear)
