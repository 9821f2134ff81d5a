"""The classes that vLLM gets on a GPU, and devices that are refused."""

import importlib
import inspect
import re
import sys
import types

import pytest
import torch

import vllm_flashprefill
from tests.support.engines import engine_arguments
from tests.support.registered import LOADER, VERSION, attention, registry
from vllm_flashprefill.patches.versions import support_for


def test_the_cuda_class_is_the_one_vllm_gets():
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

    vllm_flashprefill.register()
    if registry() is None:
        loader = importlib.import_module(f"vllm_flashprefill.patches.{LOADER}")
        path = loader.CLASS_PATHS["vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"]
    else:
        path = registry().AttentionBackendEnum.FLASH_ATTN.get_path()
    module, _, name = path.rpartition(".")
    backend = getattr(importlib.import_module(module), name)
    assert issubclass(backend.get_impl_cls(), FlashAttentionImpl)
    assert issubclass(backend.get_builder_cls(), FlashAttentionMetadataBuilder)


@pytest.fixture
def choose(monkeypatch):
    """vLLM's own choice for a Hopper GPU, which is its extension modules' and drivers' no business."""
    if registry() is None:
        pytest.skip("vLLM 0.10.0 has no backend registry; its CPU platform alone is patched here")
    for name in ("vllm._C", "vllm._C_stable_libtorch"):
        # A CPU package may have this one beside those for other instructions, of which one alone can be loaded.
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    def choose(choice, **layer):
        vllm_flashprefill.register()
        get_attn_backend = importlib.import_module(f"{attention()}.selector").get_attn_backend
        arguments = {}
        if "block_size" in inspect.signature(get_attn_backend).parameters:
            layer["block_size"] = 16
        if VERSION != "0.12.0":
            arguments = {"attention_backend": choice}
        elif choice:
            monkeypatch.setenv("VLLM_ATTENTION_BACKEND", choice)
        config = EngineArgs(**engine_arguments(**arguments)).create_engine_config()
        hopper = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        monkeypatch.setattr(NonNvmlCudaPlatform, "get_device_capability", hopper)
        monkeypatch.setattr("vllm.platforms._current_platform", NonNvmlCudaPlatform())
        with set_current_vllm_config(config):
            return get_attn_backend(64, torch.bfloat16, "auto", **layer)

    return choose


@pytest.mark.parametrize("choice", [None, "FLASH_ATTN", "CUSTOM"])
def test_the_cuda_platform_gives_layers_our_backend(choose, choice, caplog):
    backend = choose(choice)
    assert "vLLM has chosen" not in caplog.text
    assert backend.__module__ == f"vllm_flashprefill.patches.{support_for(VERSION).flash_attn}"
    # In the engine vLLM asks for the name of its own backend.
    assert backend.get_name() == "FLASH_ATTN"


def test_layers_that_get_another_backend_are_named_once(choose, caplog):
    """Asked for here; vLLM may choose it by itself, for some layers alone."""
    for _ in range(2):
        assert choose("TRITON_ATTN").__name__ == "TritonAttentionBackend"
    lines = [record.getMessage() for record in caplog.records if "vLLM has chosen" in record.getMessage()]
    assert len(lines) == 1 and "has chosen TritonAttentionBackend for layers of this model" in lines[0]


@pytest.mark.parametrize(
    ("capability", "missing", "message"),
    [
        (None, None, "FlashPrefill runs on NVIDIA GPUs and CPUs, not on cpu; unset FLASHPREFILL"),
        ((7, 5), None, "need a GPU of compute capability 8.0 (Ampere) or newer, this one has 7.5; unset FLASHPREFILL"),
        ((9, 0), "triton", "need Triton, which cannot be imported"),
    ],
)
def test_a_device_the_kernels_cannot_use_stops_before_a_model_loads(monkeypatch, capability, missing, message):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    # After vLLM has made its own config for the CPU, the platform says what this test wants.
    def other_platform(original):
        def create_engine_config(self, *args, **kwargs):
            vllm_config = original(self, *args, **kwargs)
            platform = type(current_platform)
            monkeypatch.setattr(platform, "is_cpu", lambda self: False)
            monkeypatch.setattr(platform, "is_cuda", lambda self: capability is not None)
            if capability is not None:
                found = DeviceCapability(*capability)
                monkeypatch.setattr(platform, "get_device_capability", lambda *args, **kwargs: found)
            if missing:
                monkeypatch.setitem(sys.modules, missing, None)
            return vllm_config

        return create_engine_config

    monkeypatch.setattr(EngineArgs, "create_engine_config", other_platform(EngineArgs.create_engine_config))
    vllm_flashprefill.register()
    try:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            EngineArgs(**engine_arguments()).create_engine_config()
    finally:
        vllm_flashprefill.revert()
