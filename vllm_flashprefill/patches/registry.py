"""What the patches of different vLLM versions share: the backend class, and the loader where vLLM has a registry."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from vllm_flashprefill.patches import registration, symbols, undo
from vllm_flashprefill.patches.versions import installed_vllm, support_for

logger = logging.getLogger("vllm.flashprefill")


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


def class_path(module: str, name: str) -> str:
    """vLLM's way to name a class of a module of this package."""
    return f"{__package__}.{module}.{name}"


def loader(module: str, attention: str) -> Callable[[], None]:
    """The `load` of a loader: registers in this process, and in those it starts. Idempotent; its import calls it.

    vLLM's registry then answers our classes for its CPU and FlashAttention backends, and for CUSTOM.

    Args:
        module: the loader's name.
        attention: vLLM's package with the modules ``backends.registry`` and ``selector``.

    Raises (when called):
        RuntimeError: someone else has replaced one of them; and as of `registration.load`.
    """
    return functools.partial(registration.load, module, functools.partial(_override_backends, attention))


def _override_backends(attention: str) -> None:
    support = support_for(installed_vllm())
    flash_attn = class_path(support.flash_attn, "FlashPrefillFlashAttnBackend")
    cpu = class_path(support.cpu, "FlashPrefillCPUBackend")
    paths = {"CPU_ATTN": cpu, "FLASH_ATTN": flash_attn, "CUSTOM": flash_attn}
    registry = importlib.import_module(f"{attention}.backends.registry")
    selector = importlib.import_module(f"{attention}.selector")
    import_classes(cpu, flash_attn)
    members = registry.AttentionBackendEnum
    for name in paths:
        if members[name].is_overridden():
            raise RuntimeError(
                f"vLLM's {name} backend is already replaced by {members[name].get_path()}; load only one"
            )
    for name, path in paths.items():
        undo.on_revert(members[name].clear_override)
        registry.register_backend(members[name], class_path=path)
    selector._cached_get_attn_backend.cache_clear()
    undo.on_revert(selector._cached_get_attn_backend.cache_clear)
    undo.wrap(selector, "_cached_get_attn_backend", functools.partial(_saying_others, said=set()))


def _saying_others(select: Any, said: set[str]) -> Any:
    """vLLM's choice for a layer, which is said where it is none of ours: such a layer is not in the counters.

    It may be made of FlashAttention's class and another one (vLLM 0.26 and newer), or asked for by kind of layer.
    """

    @functools.wraps(select)
    def selected(*args: Any, **kwargs: Any) -> type:
        backend = select(*args, **kwargs)
        layer = kwargs.get("attn_selector_config")
        attn_type = getattr(layer, "attn_type", kwargs.get("attn_type", "decoder"))
        is_mla = getattr(layer, "use_mla", kwargs.get("use_mla", False))
        is_ours = issubclass(backend, FlashPrefillBackendMixin)
        if not is_ours and not is_mla and getattr(attn_type, "value", attn_type) in (None, "decoder"):
            if backend.__name__ not in said:
                said.add(backend.__name__)
                logger.warning(
                    "FlashPrefill: vLLM has chosen %s for layers of this model, whose prefills stay dense and are not "
                    "counted; --attention-backend CUSTOM asks for FlashPrefill's own",
                    backend.__name__,
                )
        return backend

    selected.cache_clear = select.cache_clear
    return selected


def import_classes(cpu: str, flash_attn: str) -> None:
    """Import the backend class that this platform's layers will get, and look up what it calls.

    vLLM imports it when it makes the first layer, and where that fails takes its next backend without a word.

    Raises:
        ImportError, AttributeError: this vLLM has not what it extends.
    """
    from vllm.platforms import current_platform

    module, _, name = (cpu if current_platform.is_cpu() else flash_attn).rpartition(".")
    symbols.check_backend(getattr(importlib.import_module(module), name))
