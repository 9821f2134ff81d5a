"""Which loader goes with which vLLM, and what it needs of it."""

import importlib
import importlib.util
import os
import re

import pytest

import vllm_flashprefill
from tests.support.registered import LOADER, VERSION, patched, registry
from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin, KVWrittenBeforeMixin
from vllm_flashprefill.patches import versions

OTHERS = [loader for loader in versions.LOADERS.values() if loader != LOADER]


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


@pytest.mark.parametrize("name", ["cpu.FlashPrefillCPUImpl", "flash_attn.FlashPrefillFlashAttnImpl"])
def test_the_cache_is_written_by_the_layer_or_by_our_impl(name):
    module, _, impl_class = name.partition(".")
    classes = importlib.import_module(f"vllm_flashprefill.patches.vllm_{VERSION.replace('.', '_')}_{module}")
    impl = getattr(classes, impl_class)
    assert impl.write_kv is not FlashPrefillImplMixin.write_kv
    assert hasattr(impl, "do_kv_cache_update") == (impl.write_kv is KVWrittenBeforeMixin.write_kv)


def test_a_version_that_does_not_say_who_writes_the_cache_is_an_error():
    with pytest.raises(NotImplementedError):
        FlashPrefillImplMixin.write_kv(*[None] * 6)
