"""One registration a process: made by the loader of the installed vLLM, and undone."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm_flashprefill import counters
from vllm_flashprefill.backend import prompt_lengths
from vllm_flashprefill.config import (
    ENV_CODE_OPTIONS,
    ENV_ENABLE,
    FlashPrefillConfig,
    code_options,
    enabled,
    log_interval,
    strict,
)
from vllm_flashprefill.patches import engine_checks, undo, workers
from vllm_flashprefill.patches.versions import (
    TESTED,
    UnsupportedVllmError,
    check_installation,
    installed_vllm,
    loader_for,
)

logger = logging.getLogger("vllm.flashprefill")

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "flashprefill"

_registered: str | None = None


def register(options: Mapping[str, Any] | None = None) -> None:
    """Load the loader of the installed vLLM; see `vllm_flashprefill.register`."""
    if options is not None:
        FlashPrefillConfig.from_options(options)
        if _registered is not None and dict(options) != code_options():
            raise RuntimeError(
                f"flashprefill is already registered with the options {code_options()}; "
                "call vllm_flashprefill.revert() before registering others"
            )
    if _registered is not None:
        return
    if options:
        undo.set_variable(ENV_CODE_OPTIONS, json.dumps(dict(options)))
    try:
        importlib.import_module(f"vllm_flashprefill.patches.{loader_for(installed_vllm())}").load()
    except BaseException:
        undo.run()
        raise


def register_or_stay_dense() -> None:
    """`register` for a process that vLLM started: where the installed vLLM is not as expected, it serves dense.

    Raises:
        UnsupportedVllmError: ``FLASHPREFILL_STRICT=1``.
    """
    try:
        register()
    except UnsupportedVllmError as error:
        if strict():
            raise
        logger.error("FlashPrefill is off and vLLM serves dense: %s", error)


def load(loader_name: str, apply: Callable[[], None]) -> None:
    """Run a loader's `apply` once, after the checks that need no model; its children will do the same.

    Args:
        loader_name: the loader's module name.
        apply: patches vLLM, undoing through `undo.on_revert`.

    Raises:
        ValueError: an unknown variable or option, a wrong type or a value out of range.
        RuntimeError: the wrong loader for the installed vLLM, or one whose processes would not find the plugin.
        UnsupportedVllmError: that vLLM has not what the loader extends.
    """
    global _registered
    check_installation()
    name = loader_name.rpartition(".")[2]
    right = loader_for(installed_vllm())
    if name != right:
        raise RuntimeError(
            f"{name} is not for the installed vLLM {installed_vllm()}; import {right} instead, or set {ENV_ENABLE}=1"
        )
    if _registered is not None:
        return
    FlashPrefillConfig.from_env()
    log_interval()
    enabled()
    strict()
    _check_plugin_is_found()
    # Imports what comes with vLLM.
    from vllm_flashprefill.patches import metrics_endpoint

    metrics_endpoint.show()
    try:
        apply()
        engine_checks.check_engines()
        # The processes of an engine are started after its config is made, perhaps by another process.
        engine_checks.on_engine_config(lambda _: counters.share_stats())
        engine_checks.on_engine_start(counters.share_stats)
        workers.send_variables()
        workers.check_workers()
    except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A module, a name, a member of its enum or an argument is not there.
        undo.run()
        raise UnsupportedVllmError(
            f"vLLM {installed_vllm()} has not what {name} extends ({error}); "
            f"install one of vLLM {', '.join(TESTED)}, or unset {ENV_ENABLE}"
        ) from error
    except BaseException:
        undo.run()
        raise
    undo.set_variable(ENV_ENABLE, "1")
    undo.on_revert(counters.unshare_stats)
    undo.on_revert(prompt_lengths.unwatch_all)
    undo.on_revert(lambda: _forget_loader(name))
    _registered = name
    logger.info("FlashPrefill is registered for vLLM %s", installed_vllm())


def is_registered() -> bool:
    """Whether this process is registered."""
    return _registered is not None


def revert() -> None:
    """Undo the registration of this process; nothing if there is none."""
    global _registered
    undo.run()
    _registered = None


def _check_plugin_is_found() -> None:
    """vLLM's engine and worker processes find the backend by its entry point only."""
    found = {entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in found:
        raise RuntimeError(
            "vLLM's engine process would not find FlashPrefill, because the package is not installed; "
            "run `pip install -e .` in its checkout"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading FlashPrefill; add {PLUGIN_NAME} to it")


def _forget_loader(name: str) -> None:
    """Have the next import of a loader run it again, also where it is another module, imported from the checkout."""
    for package in ("vllm_flashprefill.patches", "patches"):
        sys.modules.pop(f"{package}.{name}", None)
    vars(sys.modules["vllm_flashprefill.patches"]).pop(name, None)
