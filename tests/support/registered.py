"""The loader of the installed vLLM, and whatever registering changes outside the package."""

import importlib
import os

from tests.support.engines import vllm_version
from vllm_flashprefill.patches.versions import loader_for

VERSION = vllm_version()
LOADER = loader_for(VERSION)


def registry():
    """vLLM's module of attention backends; 0.10.0 has none."""
    if LOADER == "patch_loader_vllm_0_10_0":
        return None
    return importlib.import_module(f"{attention()}.backends.registry")


def attention():
    """vLLM's package with the registry and the selector of attention backends."""
    return "vllm.attention" if LOADER == "patch_loader_vllm_0_12_0" else "vllm.v1.attention"


def patched():
    """Whatever registering changes outside the package."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor

    names = sorted(name for name in os.environ if name.startswith("FLASHPREFILL"))
    overrides = dict(registry()._ATTN_OVERRIDES) if registry() else {}
    methods = EngineArgs.create_engine_config, Executor.get_class, current_platform.get_attn_backend_cls
    return names, overrides, methods
