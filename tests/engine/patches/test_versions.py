"""Which loader goes with which vLLM, and what it needs of it."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys

import pytest
from packaging.version import Version

import vllm_flashprefill
from tests.support.registered import LOADER, VERSION, patched, registry
from vllm_flashprefill import plugin
from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin, KVWrittenBeforeMixin
from vllm_flashprefill.patches import versions

OTHERS = sorted({support.loader for support in versions.SUPPORT.values()} - {LOADER})


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
    with pytest.raises(RuntimeError, match=re.escape("supports vLLM 0.10.0 and newer, not 0.9.2; install one of 0.10")):
        versions.loader_for("0.9.2")
    assert versions.loader_for("0.11.0") == "patch_loader_vllm_0_10_0"
    assert versions.loader_for("0.11.1") == "patch_loader_vllm_0_12_0"
    assert versions.loader_for("0.22.1") == "patch_loader_vllm_0_15_0"
    assert versions.loader_for("0.25.1") == "patch_loader_vllm_0_24_0"
    assert versions.loader_for("0.99.0") == "patch_loader_vllm_0_26_0"
    tested = ", ".join(versions.TESTED)
    assert len(warnings) == 5
    assert all(f"is tested with vLLM {tested}, not 0." in warning for warning in warnings)
    for version in versions.TESTED:
        versions.loader_for(version)
    assert len(warnings) == 5
    monkeypatch.setattr("vllm.__version__", "0.12.0+cu129")
    assert versions.installed_vllm() == "0.12.0"
    monkeypatch.setattr("vllm.__version__", "dev")
    with pytest.raises(RuntimeError, match="does not know a vLLM of the version 'dev'"):
        versions.installed_vllm()


@pytest.mark.parametrize("strict", [False, True])
def test_a_vllm_older_than_every_loader_is_one_line(monkeypatch, caplog, strict):
    as_installed(monkeypatch, "0.9.2")
    check_off(monkeypatch, caplog, "flashprefill supports vLLM 0.10.0 and newer, not 0.9.2", strict)


@pytest.mark.parametrize("strict", [False, True])
def test_python_and_library_of_different_releases_are_one_line(monkeypatch, caplog, strict):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    check_off(monkeypatch, caplog, f"its Python says 0.99.0, the package vllm is {VERSION}; reinstall", strict)


def as_installed(monkeypatch, version):
    of = importlib.metadata.version
    monkeypatch.setattr("vllm.__version__", version)
    # By its name vLLM knows its CPU build.
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{version}+cpu" if "vllm" in name else of(name))


def check_off(monkeypatch, caplog, said, strict):
    """The plugin patches nothing, says why in one line and leaves vLLM to serve dense, unless it is to be strict."""
    before = patched()
    monkeypatch.setenv("FLASHPREFILL", "1")
    monkeypatch.setenv("FLASHPREFILL_STRICT", str(int(strict)))
    unpatched = patched()[1:]
    with caplog.at_level("ERROR", "vllm.flashprefill"):
        if strict:
            with pytest.raises(versions.UnsupportedVllmError, match=re.escape(said)):
                plugin.register()
        else:
            plugin.register()
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.flashprefill"]
    assert patched()[1:] == unpatched == before[1:]
    if not strict:
        (line,) = [line for line in lines if "is off and vLLM serves dense" in line]
        assert said in line and "\n" not in line
    with pytest.raises(versions.UnsupportedVllmError, match=re.escape(said)):
        vllm_flashprefill.register()


def test_a_vllm_newer_than_the_newest_loader(monkeypatch, warnings, caplog):
    """It is tried; where the newest loader does not find what it extends, vLLM serves dense."""
    as_installed(monkeypatch, "0.99.0")
    # What the newest loader extends on a CPU is all there since 0.24.0.
    if Version(VERSION) >= Version("0.24"):
        vllm_flashprefill.register()
        assert os.environ["FLASHPREFILL"] == "1"
    else:
        message = "vLLM 0.99.0 has not what patch_loader_vllm_0_26_0 extends"
        check_off(monkeypatch, caplog, message, strict=False)
    (warning,) = set(warnings)
    assert warning.endswith("not 0.99.0; trying patch_loader_vllm_0_26_0")


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


@pytest.mark.skipif(VERSION == "0.10.0", reason="vLLM's own import of it is an error there")
def test_a_backend_that_cannot_be_imported_is_one_error(monkeypatch):
    """vLLM would say so at debug level, and take another backend."""
    before = patched()
    monkeypatch.setitem(sys.modules, f"vllm_flashprefill.patches.{versions.support_for(VERSION).cpu}", None)
    with pytest.raises(versions.UnsupportedVllmError, match=f"has not what {LOADER} extends"):
        vllm_flashprefill.register()
    assert patched() == before


@pytest.mark.skipif(VERSION == "0.10.0", reason="its loader serves a frozen release")
@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("impl", "forward", "forward takes self, query, not self, layer, query"),
        ("builder", "build", "build takes self, query, not self, common_prefix_len"),
    ],
)
def test_a_changed_signature_is_one_error(monkeypatch, part, name, said):
    from vllm.v1.attention.backends import cpu_attn

    before = patched()
    owner = getattr(cpu_attn, {"impl": "CPUAttentionBackendImpl", "builder": "CPUAttentionMetadataBuilder"}[part])
    monkeypatch.setattr(owner, name, lambda self, query: None)
    with pytest.raises(versions.UnsupportedVllmError, match=re.escape(said)):
        vllm_flashprefill.register()
    assert patched() == before


@pytest.mark.parametrize("kind", ["cpu", "flash_attn"])
def test_the_cache_is_written_by_the_layer_or_by_our_impl(kind):
    module = getattr(versions.support_for(VERSION), kind)
    classes = importlib.import_module(f"vllm_flashprefill.patches.{module}")
    impl = classes.FlashPrefillCPUImpl if kind == "cpu" else classes.FlashPrefillFlashAttnImpl
    assert impl.write_kv is not FlashPrefillImplMixin.write_kv
    assert hasattr(impl, "do_kv_cache_update") == (impl.write_kv is KVWrittenBeforeMixin.write_kv)


def test_a_version_that_does_not_say_who_writes_the_cache_is_an_error():
    with pytest.raises(NotImplementedError):
        FlashPrefillImplMixin.write_kv(*[None] * 6)
