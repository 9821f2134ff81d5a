"""The loader of the installed vLLM, and whatever registering changes outside the package."""

import importlib
import os

from tests.support.engines import vllm_version

VERSION = vllm_version()
LOADER = f"patch_loader_vllm_{VERSION.replace('.', '_')}"


def registry():
    """vLLM's module of attention backends; 0.10.0 has none."""
    paths = {"0.10.0": None, "0.12.0": "vllm.attention.backends.registry"}
    path = paths.get(VERSION, "vllm.v1.attention.backends.registry")
    return path and importlib.import_module(path)


def patched():
    """Whatever registering changes outside the package."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor

    names = sorted(name for name in os.environ if name.startswith("FLASHPREFILL"))
    overrides = dict(registry()._ATTN_OVERRIDES) if registry() else {}
    methods = EngineArgs.create_engine_config, Executor.get_class, current_platform.get_attn_backend_cls
    return names, overrides, methods
