"""The three ways of use, each with the engine core in its own process, and the errors before a model loads."""

import importlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest
import torch

import vllm_flashprefill
from tests.support import MODEL, ROOT
from tests.support.engines import engine_arguments, environment, flashprefill_metrics, run_engine, vllm_version
from vllm_flashprefill.patches import versions

VERSION = vllm_version()
LOADER = f"patch_loader_vllm_{VERSION.replace('.', '_')}"
OTHERS = [loader for loader in versions.LOADERS.values() if loader != LOADER]


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    vllm_flashprefill.revert()


def test_a_loader_makes_the_engines_own_process_sparse(text_ids):
    results, log = run_engine(
        [[(text_ids[:1500], 2)], [(text_ids[:60], 2)]],
        env={
            "FLASHPREFILL_MIN_SPARSE_TOKENS": "1024",
            "FLASHPREFILL_NUM_DENSE_LAYERS": "3",
            "FLASHPREFILL_LOG_STATS": "0.1",
        },
    )
    long, short = (result["stats"] for result in results)
    assert long["sparse_tokens"] == 27 * 1500
    assert long["dense_tokens"] == {"dense_layer": 3 * 1501, "decode": 27}
    assert short["dense_tokens"] == {"dense_layer": 3 * 61, "short_prompt": 27 * 60, "decode": 27}
    assert "num_dense_layers=3" in log
    assert "FlashPrefill: density" in log
    assert "short_prompt" in log


def test_vllm_serve_with_the_variable_alone(text_ids):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = os.path.join(os.path.dirname(sys.executable), "vllm")
    env = environment(FLASHPREFILL="1", FLASHPREFILL_ALPHA="0.9", FLASHPREFILL_LOG_STATS="0.1")
    options = json.dumps({"flashprefill": {"alpha": 0.2, "min_sparse_tokens": 1024}})
    command = [vllm, "serve", str(MODEL), "--enforce-eager", "--port", str(port), "--max-model-len", "4096"]
    command += ["--max-num-batched-tokens", "2048", "--max-num-seqs", "16", "--additional-config", options]
    if VERSION not in ("0.10.0", "0.12.0"):
        command += ["--attention-backend", "CUSTOM"]
    server = subprocess.Popen(
        command,
        cwd="/",
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, server.stdout.read()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        body = json.dumps({"model": str(MODEL), "prompt": text_ids[:1500], "max_tokens": 2, "temperature": 0})
        request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        assert answer["usage"]["prompt_tokens"] == 1500
        scraped = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            log = server.communicate(timeout=30)[0]
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            log = server.communicate()[0]
    assert "FlashPrefillConfig(alpha=0.2, " in log
    assert "FlashPrefill: density" in log
    assert "vllm:prompt_tokens_total" in scraped
    counted = flashprefill_metrics(scraped)
    assert counted["sparse_tokens_total"] == 30 * 1500
    assert {name: value for name, value in counted.items() if "reason" in name} == {
        'dense_tokens_total{reason="decode"}': 30
    }
    assert 0 < counted["kept_blocks_total"] < counted["visible_blocks_total"]
    assert counted["density"] == counted["kept_blocks_total"] / counted["visible_blocks_total"]
    assert counted["selection_seconds_total"] > 0
    assert counted["attention_seconds_total"] > 0


def test_without_the_variable_nothing_is_patched():
    from vllm_flashprefill import plugin

    plugin.register()
    assert "FLASHPREFILL" not in os.environ


def test_the_plugin_may_run_twice(monkeypatch):
    from vllm_flashprefill import plugin

    monkeypatch.setenv("FLASHPREFILL", "1")
    before = patched()
    plugin.register()
    once = patched()
    plugin.register()
    assert before != once == patched()


def registry():
    """vLLM's module of attention backends; 0.10.0 has none."""
    paths = {"0.10.0": None, "0.12.0": "vllm.attention.backends.registry"}
    path = paths.get(VERSION, "vllm.v1.attention.backends.registry")
    return path and importlib.import_module(path)


def patched():
    """Whatever registering changes outside the package."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    names = sorted(name for name in os.environ if name.startswith("FLASHPREFILL"))
    overrides = dict(registry()._ATTN_OVERRIDES) if registry() else {}
    return names, overrides, EngineArgs.create_engine_config, current_platform.get_attn_backend_cls


def test_revert_undoes_everything():
    before = patched()
    vllm_flashprefill.register(alpha=0.5)
    assert patched() != before
    vllm_flashprefill.revert()
    assert patched() == before
    vllm_flashprefill.register(alpha=0.25)
    assert json.loads(os.environ["FLASHPREFILL_CODE_OPTIONS"]) == {"alpha": 0.25}


@pytest.mark.parametrize("package", ["patches", "vllm_flashprefill.patches"])
def test_importing_the_loader_again_after_revert_registers_again(package, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    before = patched()
    exec(f"from {package} import {LOADER}")
    once = patched()
    vllm_flashprefill.revert()
    assert patched() == before != once
    exec(f"from {package} import {LOADER}")
    names, *_ = patched()
    assert names == once[0] and patched() != before


def test_counters_have_a_folder_from_an_engines_config_to_revert():
    from vllm.engine.arg_utils import EngineArgs

    vllm_flashprefill.register()
    assert "FLASHPREFILL_STATS_DIR" not in os.environ, "two engines of this process's children would share it"
    EngineArgs(**engine_arguments()).create_engine_config()
    folder = os.environ["FLASHPREFILL_STATS_DIR"]
    assert os.path.isdir(folder)
    EngineArgs(**engine_arguments()).create_engine_config()
    assert os.environ["FLASHPREFILL_STATS_DIR"] == folder
    vllm_flashprefill.revert()
    assert "FLASHPREFILL_STATS_DIR" not in os.environ


def test_registering_again_with_the_same_options_is_nothing_new():
    vllm_flashprefill.register(alpha=0.5)
    once = patched()
    vllm_flashprefill.register(alpha=0.5)
    assert patched() == once


def test_registering_other_options_is_refused():
    vllm_flashprefill.register(alpha=0.5)
    with pytest.raises(RuntimeError, match=re.escape("already registered with the options {'alpha': 0.5}")):
        vllm_flashprefill.register(alpha=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alhpa": 0.5}, "unknown option 'alhpa'; did you mean alpha?"),
        ({"alpha": 2}, r"alpha must be a number in \[0, 1\]"),
    ],
)
def test_bad_options_in_code(options, message):
    before = patched()
    with pytest.raises(ValueError, match=message):
        vllm_flashprefill.register(**options)
    assert patched() == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FLASHPREFILL_ALHPA", "1", "unknown environment variable FLASHPREFILL_ALHPA; did you mean"),
        ("FLASHPREFILL_ALPHA", "1.5", r"alpha must be a number in \[0, 1\], not 1.5"),
        ("FLASHPREFILL_LOG_STATS", "often", "FLASHPREFILL_LOG_STATS must be"),
        ("VLLM_PLUGINS", "other", "add flashprefill to it"),
    ],
)
def test_bad_variables(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, RuntimeError), match=message):
        vllm_flashprefill.register()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "flashprefill: alpha must be a number in [0, 1], not 1.5"),
        ({"alhpa": 0.5}, "flashprefill: unknown option 'alhpa'; did you mean alpha?"),
    ],
)
def test_bad_additional_config_stops_before_a_model_loads(options, message, monkeypatch):
    from vllm import LLM
    from vllm.v1.engine.core import EngineCore

    monkeypatch.setattr(EngineCore, "__init__", lambda *args, **kwargs: pytest.fail("an engine was started"))
    vllm_flashprefill.register()
    with pytest.raises(ValueError) as error:
        LLM(**engine_arguments(additional_config={"flashprefill": options}))
    assert str(error.value) == message


def test_heads_that_two_ranks_cannot_share_are_vllms_own_error():
    from vllm.engine.arg_utils import EngineArgs

    vllm_flashprefill.register()
    message = "Total number of attention heads (9) must be divisible by tensor parallel size (2)"
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineArgs(**engine_arguments(tensor_parallel_size=2)).create_engine_config()


@pytest.mark.parametrize("other", OTHERS)
def test_the_loader_of_another_version_names_the_right_one(other):
    with pytest.raises(RuntimeError, match=f"{other} is not for the installed vLLM .*; import {LOADER} instead"):
        importlib.import_module(f"vllm_flashprefill.patches.{other}")


@pytest.fixture
def warnings(monkeypatch):
    versions._warn_untested.cache_clear()
    warnings = []
    monkeypatch.setattr(versions.logger, "warning", lambda text, *values: warnings.append(text % values))
    yield warnings
    versions._warn_untested.cache_clear()


def test_versions_without_a_loader_of_their_own(monkeypatch, warnings):
    with pytest.raises(RuntimeError, match=r"supports vLLM 0.10.0, 0.12.0, 0.24.0, not 0.9.2"):
        versions.loader_for("0.9.2")
    assert versions.loader_for("0.11.1") == "patch_loader_vllm_0_10_0"
    assert versions.loader_for("0.23.0") == "patch_loader_vllm_0_12_0"
    assert versions.loader_for("0.99.0") == "patch_loader_vllm_0_24_0"
    assert [warning.count("is tested with vLLM 0.10.0, 0.12.0, 0.24.0, not 0.") for warning in warnings] == [1, 1, 1]
    monkeypatch.setattr("vllm.__version__", "0.12.0+cu129")
    assert versions.installed_vllm() == "0.12.0"


def test_a_vllm_newer_than_the_newest_loader(monkeypatch, warnings):
    """It is tried; where the newest loader does not find what it extends, that is one error."""
    before = patched()
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    if VERSION == "0.24.0":
        vllm_flashprefill.register()
        assert os.environ["FLASHPREFILL"] == "1"
    else:
        message = "vLLM 0.99.0 has not what patch_loader_vllm_0_24_0 extends"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            vllm_flashprefill.register()
        assert patched() == before
    assert warnings == [
        "FlashPrefill is tested with vLLM 0.10.0, 0.12.0, 0.24.0, not 0.99.0; trying patch_loader_vllm_0_24_0"
    ]


def missing_symbols():
    """Where this version's loader looks for what it extends: [(owner, name)]."""
    if VERSION == "0.10.0":
        return [("vllm.attention.selector", "_cached_get_attn_backend")]
    path = registry().__name__
    return [
        (path, "register_backend"),
        (f"{path}.AttentionBackendEnum", "is_overridden"),
        (f"{path}.AttentionBackendEnum", "clear_override"),
        (path.replace("backends.registry", "selector"), "_cached_get_attn_backend"),
    ]


@pytest.mark.parametrize(("owner", "name"), missing_symbols())
def test_a_missing_symbol_is_one_error(monkeypatch, owner, name):
    loader = importlib.import_module(f"vllm_flashprefill.patches.{LOADER}")
    vllm_flashprefill.revert()
    before = patched()
    with monkeypatch.context() as patch:
        patch.delattr(f"{owner}.{name}")
        with pytest.raises(RuntimeError, match=f"has not what {LOADER} extends .*{name}"):
            loader.load()
    assert patched() == before


def test_a_package_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(RuntimeError, match="the package is not installed"):
        vllm_flashprefill.register()


def test_v0_engine_is_refused(monkeypatch):
    if VERSION != "0.10.0":
        pytest.skip(f"vLLM {VERSION} has no V0 engine")
    monkeypatch.setenv("VLLM_USE_V1", "0")
    with pytest.raises(RuntimeError, match=re.escape("serves vLLM 0.10.0's V1 engine only")):
        vllm_flashprefill.register()


@pytest.mark.parametrize("name", ["CPU_ATTN", "FLASH_ATTN", "CUSTOM"])
def test_a_backend_that_someone_else_replaced_is_refused(name):
    if registry() is None:
        pytest.skip("vLLM 0.10.0 has no backend registry")
    member = registry().AttentionBackendEnum[name]
    registry().register_backend(member, class_path="elsewhere.Backend")
    try:
        with pytest.raises(RuntimeError, match=re.escape(f"{name} backend is already replaced by elsewhere.Backend")):
            vllm_flashprefill.register()
    finally:
        member.clear_override()


def test_the_cuda_class_is_the_one_vllm_gets():
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

    vllm_flashprefill.register()
    if VERSION == "0.10.0":
        loader = importlib.import_module(f"vllm_flashprefill.patches.{LOADER}")
        path = loader.CLASS_PATHS["vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"]
    else:
        path = registry().AttentionBackendEnum.FLASH_ATTN.get_path()
    module, _, name = path.rpartition(".")
    backend = getattr(importlib.import_module(module), name)
    assert issubclass(backend.get_impl_cls(), FlashAttentionImpl)
    assert issubclass(backend.get_builder_cls(), FlashAttentionMetadataBuilder)


@pytest.mark.parametrize("choice", [None, "FLASH_ATTN", "CUSTOM"])
def test_the_cuda_platform_gives_layers_our_backend(monkeypatch, choice):
    """vLLM's own choice for a Hopper GPU, which is its extension modules' and drivers' no business."""
    if registry() is None:
        pytest.skip("vLLM 0.10.0 has no backend registry; its CPU platform alone is patched here")
    for name in ("vllm._C", "vllm._C_stable_libtorch"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    vllm_flashprefill.register()
    arguments, selected = {}, {}
    if VERSION == "0.12.0":
        from vllm.attention.selector import get_attn_backend

        selected = {"block_size": 16}
        if choice:
            monkeypatch.setenv("VLLM_ATTENTION_BACKEND", choice)
    else:
        from vllm.v1.attention.selector import get_attn_backend

        arguments = {"attention_backend": choice}
    config = EngineArgs(**engine_arguments(**arguments)).create_engine_config()
    hopper = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    monkeypatch.setattr(NonNvmlCudaPlatform, "get_device_capability", hopper)
    monkeypatch.setattr("vllm.platforms._current_platform", NonNvmlCudaPlatform())
    with set_current_vllm_config(config):
        backend = get_attn_backend(64, torch.bfloat16, "auto", **selected)
    assert backend.__module__ == f"vllm_flashprefill.patches.vllm_{VERSION.replace('.', '_')}_flash_attn"
    # In the engine vLLM asks for the name of its own backend.
    assert backend.get_name() == "FLASH_ATTN"


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


def test_imports_from_the_checkout_are_the_packages_own(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "patches", raising=False)
    namespace = {}
    exec(f"from patches import {LOADER} as loader", namespace)
    assert namespace["loader"] is importlib.import_module(f"vllm_flashprefill.patches.{LOADER}")
