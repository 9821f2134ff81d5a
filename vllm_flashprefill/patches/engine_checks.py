"""What is done before an engine's processes start: above all, checks of its options and device.

Target: ``EngineArgs.create_engine_config`` and ``Executor.get_class`` of engine V1.
Why: an error in the engine's or a worker's process comes late, after a traceback. An engine whose config was made
elsewhere, or by hand, begins with the second.
How: each check runs on the ``VllmConfig`` that the first returns, other preparations before the second.
Can go: once vLLM asks its plugins about an engine's options.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from vllm_flashprefill.backend.engine_routing import check_compute_dtype, engine_dense_reason
from vllm_flashprefill.config import ENV_ENABLE, FlashPrefillConfig
from vllm_flashprefill.counters import of_parents_engine
from vllm_flashprefill.patches import undo

logger = logging.getLogger("vllm.flashprefill")


def check_engines() -> None:
    """Check the device and the options of each engine that this process configures, and log what the options are."""

    def check(vllm_config: Any) -> None:
        check_device()
        config = FlashPrefillConfig.from_vllm(vllm_config)
        check_compute_dtype(vllm_config, config, backend_and_capability(vllm_config)[1])
        logger.info("FlashPrefill: %s", config)
        _warn_if_nothing_is_pruned(vllm_config, config)

    on_engine_config(check)


def on_engine_config(check: Callable[[Any], None]) -> None:
    """Run a check on each engine's ``VllmConfig`` when it is made, after the checks that are there."""
    from vllm.engine.arg_utils import EngineArgs

    def checked(original: Any) -> Any:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            check(vllm_config)
            return vllm_config

        return create_engine_config

    undo.wrap(EngineArgs, "create_engine_config", checked)


def on_engine_start(prepare: Callable[[], None]) -> None:
    """Run this before each engine that this process starts, whoever made its config."""
    from vllm.v1.executor.abstract import Executor

    def prepared(original: Any) -> Any:
        @functools.wraps(original)
        def get_class(*args: Any, **kwargs: Any) -> Any:
            prepare()
            return original(*args, **kwargs)

        return staticmethod(get_class)

    undo.wrap(Executor, "get_class", prepared)


def backend_and_capability(vllm_config: Any) -> tuple[str | None, tuple[int, int] | None]:
    """The attention backend that was asked for, and the GPU's compute capability; None for none."""
    from vllm import envs
    from vllm.platforms import current_platform

    # An option since vLLM 0.13, an environment variable before.
    chosen = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    backend = getattr(chosen, "name", chosen) or getattr(envs, "VLLM_ATTENTION_BACKEND", None)
    return backend, current_platform.get_device_capability() if current_platform.is_cuda() else None


def _warn_if_nothing_is_pruned(vllm_config: Any, config: FlashPrefillConfig) -> None:
    reason = engine_dense_reason(vllm_config, config, *backend_and_capability(vllm_config))
    # One of several API servers configures again the engine that its parent has.
    if reason is not None and not of_parents_engine():
        logger.warning("FlashPrefill prunes nothing in this engine: %s", reason)


def check_device() -> None:
    """See that the kernels would run, without touching the GPU: this process may be about to fork.

    Raises:
        RuntimeError: they would not.
    """
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
