"""What the patch loaders share: one registration a process, its checks, and its undoing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm_flashprefill.backend import prompt_lengths, stats
from vllm_flashprefill.backend.routing import engine_dense_reason
from vllm_flashprefill.config import (
    ENV_CODE_OPTIONS,
    ENV_ENABLE,
    FlashPrefillConfig,
    code_options,
    enabled,
    log_interval,
)

logger = logging.getLogger("vllm.flashprefill")

LOADERS = {
    "0.10.0": "patch_loader_vllm_0_10_0",
    "0.12.0": "patch_loader_vllm_0_12_0",
    "0.24.0": "patch_loader_vllm_0_24_0",
}
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "flashprefill"

_registered: str | None = None
_undo: list[Callable[[], None]] = []


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
    previous = os.environ.get(ENV_CODE_OPTIONS)
    if options:
        os.environ[ENV_CODE_OPTIONS] = json.dumps(dict(options))
    try:
        importlib.import_module(f"vllm_flashprefill.patches.{loader_for(installed_vllm())}").load()
    except BaseException:
        _restore_variable(ENV_CODE_OPTIONS, previous)
        raise
    _undo.insert(0, functools.partial(_restore_variable, ENV_CODE_OPTIONS, previous))


def load(loader_name: str, apply: Callable[[], None]) -> None:
    """Run a loader's `apply` once, after the checks that need no model; its children will do the same.

    Args:
        loader_name: the loader's module name.
        apply: patches vLLM, undoing through `on_revert`.

    Raises:
        ValueError: an unknown variable or option, a wrong type or a value out of range.
        RuntimeError: the wrong loader for the installed vLLM, or one whose processes would not find the plugin.
    """
    global _registered
    from vllm_flashprefill.patches import metrics_endpoint

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
    _check_plugin_is_found()
    metrics_endpoint.show()
    try:
        apply()
        _check_options_before_a_model_loads()
    except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A module, a name, a member of its enum or an argument is not there.
        _run_undo()
        raise RuntimeError(
            f"vLLM {installed_vllm()} has not what {name} extends ({error}); "
            f"install one of vLLM {', '.join(LOADERS)}, or unset {ENV_ENABLE}"
        ) from error
    except BaseException:
        _run_undo()
        raise
    on_revert(functools.partial(_restore_variable, ENV_ENABLE, os.environ.get(ENV_ENABLE)))
    os.environ[ENV_ENABLE] = "1"
    on_revert(stats.unshare_stats)
    on_revert(_unwatch_model_runner)
    on_revert(functools.partial(_forget_module, loader_name))
    _registered = name
    logger.info("FlashPrefill is registered for vLLM %s", installed_vllm())


def revert() -> None:
    """Undo the registration of this process; nothing if there is none."""
    global _registered
    _run_undo()
    _registered = None


def on_revert(undo: Callable[[], None]) -> None:
    """Have `revert` call this, last registered first."""
    _undo.append(undo)


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute of a class by what `make` makes of it, until `revert`.

    Raises:
        RuntimeError: the class does not define or inherit it.
    """
    if not hasattr(owner, name):
        raise RuntimeError(f"vLLM {installed_vllm()} has no {owner.__name__}.{name} for FlashPrefill to extend")
    own = owner.__dict__.get(name)
    setattr(owner, name, make(getattr(owner, name)))

    def undo() -> None:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    on_revert(undo)


def installed_vllm() -> str:
    """The release of the installed vLLM, without local or post-release parts.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    from packaging.version import Version

    try:
        from vllm import __version__
    except ImportError as error:
        raise RuntimeError(f"flashprefill needs vLLM, which cannot be imported: {error}") from error
    return Version(__version__).base_version


def loader_for(version: str) -> str:
    """The module name of the loader for a vLLM release; the nearest older one, with a warning, if none is its own.

    Raises:
        RuntimeError: older than every loader.
    """
    from packaging.version import Version

    if version in LOADERS:
        return LOADERS[version]
    tested = ", ".join(LOADERS)
    older = [known for known in LOADERS if Version(known) < Version(version)]
    if not older:
        raise RuntimeError(f"flashprefill supports vLLM {tested}, not {version}; install one of those")
    nearest = max(older, key=Version)
    _warn_untested(version, tested, LOADERS[nearest])
    return LOADERS[nearest]


@functools.cache
def _warn_untested(version: str, tested: str, loader: str) -> None:
    logger.warning("FlashPrefill is tested with vLLM %s, not %s; trying %s", tested, version, loader)


def _check_plugin_is_found() -> None:
    """vLLM's engine and worker processes find the backend by its entry point only."""
    found = {entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in found:
        raise RuntimeError(
            "vLLM's engine process would not find FlashPrefill, because the package is not installed; "
            "run `pip install --no-deps -e .` in its checkout"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading FlashPrefill; add {PLUGIN_NAME} to it")


def _check_options_before_a_model_loads() -> None:
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            _check_device()
            logger.info("FlashPrefill: %s", FlashPrefillConfig.from_vllm(vllm_config))
            _warn_if_all_is_dense(vllm_config)
            # The processes of the engine are started after this.
            stats.share_stats()
            return vllm_config

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make)


def _warn_if_all_is_dense(vllm_config: Any) -> None:
    from vllm import envs
    from vllm.platforms import current_platform

    # An option since vLLM 0.13, an environment variable before.
    chosen = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    backend = getattr(chosen, "name", chosen) or getattr(envs, "VLLM_ATTENTION_BACKEND", None)
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    reason = engine_dense_reason(vllm_config.model_config, backend, capability)
    if reason is not None:
        logger.warning("FlashPrefill: every prefill of this engine stays dense: %s", reason)


def _check_device() -> None:
    """What the kernels need, asked without touching the GPU: this process may be about to fork."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    instead = f"unset {ENV_ENABLE}, or do not import its loader, to serve dense"
    if not current_platform.is_cuda():
        raise RuntimeError(
            f"FlashPrefill runs on NVIDIA GPUs and CPUs, not on {current_platform.device_name}; {instead}"
        )
    if not current_platform.has_device_capability(80):
        capability = current_platform.get_device_capability()
        raise RuntimeError(
            "FlashPrefill's kernels need a GPU of compute capability 8.0 (Ampere) or newer, this one has "
            f"{capability.major}.{capability.minor}; {instead}"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeError(
            f"FlashPrefill's kernels need Triton, which cannot be imported ({error}); install the triton release "
            f"that the installed torch names, or {instead}"
        ) from error


def _unwatch_model_runner() -> None:
    for name, source in (
        ("vllm.v1.worker.gpu_model_runner", prompt_lengths.INPUT_BATCH),
        ("vllm.v1.worker.gpu.model_runner", prompt_lengths.PREPARED_INPUTS),
    ):
        module = sys.modules.get(name)
        if module is not None:
            prompt_lengths.unwatch(module.GPUModelRunner, source)


def _forget_module(name: str) -> None:
    """Have the next import of a loader run it again."""
    sys.modules.pop(name, None)
    package, _, attribute = name.rpartition(".")
    vars(sys.modules[package]).pop(attribute, None)


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _run_undo() -> None:
    while _undo:
        _undo.pop()()
