"""An engine of a vLLM that is not as expected."""

import importlib

import pytest

from tests.support.engines import EXACT, LAYERS, assert_same, engine, vllm_version
from vllm_flashprefill.backend import self_check
from vllm_flashprefill.patches.versions import support_for

pytestmark = pytest.mark.skipif(vllm_version() == "0.10.0", reason="its CPU engine is not checked")


@pytest.fixture
def another_cache(monkeypatch):
    """Keys are where values are taken to be."""
    module = importlib.import_module(f"vllm_flashprefill.patches.{support_for(vllm_version()).cpu}")
    impl = module.FlashPrefillCPUImpl
    paged_kv = impl.paged_kv
    monkeypatch.setattr(impl, "paged_kv", lambda self, cache: paged_kv(self, cache)[::-1])
    monkeypatch.setattr(self_check, "_results", {})


def test_it_serves_dense(another_cache, few_layers, text_ids, monkeypatch):
    lines = []
    monkeypatch.setattr(self_check.logger, "error", lambda text, *values: lines.append(text % values))
    batch = [(text_ids[:700], 3), (text_ids[900:1000], 3)]
    with engine(**few_layers) as generate:
        dense, _ = generate(batch)
    with engine(EXACT, **few_layers) as generate:
        answers, stats = generate(batch)
    assert_same(answers, dense)
    assert stats.sparse_tokens == 0 and stats.dense_tokens["self_check"] == LAYERS * (800 + 2 * 2)
    (line,) = lines
    assert "9/3 heads of 64 stay dense, since this vLLM is not as expected" in line


def test_it_stops_where_it_is_to_be_strict(another_cache, few_layers, monkeypatch):
    monkeypatch.setenv("FLASHPREFILL_STRICT", "1")
    with pytest.raises(RuntimeError, match="this vLLM is not as expected: what is written into its cache"):
        with engine(EXACT, **few_layers):
            pass


def test_bfloat16_is_as_expected(few_layers, text_ids, monkeypatch):
    """The CPU's kernels may lay out such a cache in another way."""
    monkeypatch.setenv("FLASHPREFILL_STRICT", "1")
    with engine(EXACT, dtype="bfloat16", **few_layers) as generate:
        _, stats = generate([(text_ids[:700], 2)])
    assert stats.sparse_tokens == LAYERS * 700 and stats.density == 1.0
