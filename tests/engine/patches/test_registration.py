"""Registering and reverting in this process, and the errors before a model loads."""

import importlib
import importlib.util
import json
import os
import re
import sys

import pytest

import vllm_flashprefill
from tests.support import ROOT
from tests.support.engines import engine_arguments
from tests.support.registered import LOADER, VERSION, patched, registry


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


@pytest.mark.parametrize("first", ["patches", "vllm_flashprefill.patches"])
def test_both_names_of_the_loader_register_again_after_revert(first, monkeypatch):
    """They are two modules, of which the second one imported has nothing to register."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = [f"{package}.{LOADER}" for package in sorted(("patches", "vllm_flashprefill.patches"), key=first.__ne__)]
    before = patched()
    for again in names:
        for name in names:
            importlib.import_module(name)
        vllm_flashprefill.revert()
        assert patched() == before
        importlib.import_module(again)
        assert patched() != before
        vllm_flashprefill.revert()


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


def test_counters_have_a_folder_where_an_engines_config_comes_from_elsewhere():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.abstract import Executor

    vllm_config = EngineArgs(**engine_arguments()).create_engine_config()
    vllm_flashprefill.register()
    assert "FLASHPREFILL_STATS_DIR" not in os.environ
    Executor.get_class(vllm_config)
    assert os.path.isdir(os.environ["FLASHPREFILL_STATS_DIR"])


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


def test_imports_from_the_checkout_are_the_packages_own(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "patches", raising=False)
    namespace = {}
    exec(f"from patches import {LOADER} as loader", namespace)
    assert namespace["loader"] is importlib.import_module(f"vllm_flashprefill.patches.{LOADER}")
