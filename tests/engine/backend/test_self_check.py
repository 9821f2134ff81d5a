"""What is seen of vLLM before any request, with PyTorch in place of its kernels."""

import dataclasses
import logging

import pytest
import torch

from tests.support.e4m3 import take_e4m3_caches
from tests.support.flash_attn_step import DTYPE, EXACT, SPARSE, Classes
from tests.support.vllm_side import LAYER, counted
from vllm_flashprefill import counters
from vllm_flashprefill.backend import attention_impl, self_check
from vllm_flashprefill.backend.layer_routing import has_e4m3_cache, has_quantised_query
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.routing import DenseReason


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(self_check, "_results", {})


@pytest.fixture
def check(monkeypatch):
    """Checks the layer of some classes as their builder does on a GPU; returns the classes and why they are dense."""
    from vllm.config import set_current_vllm_config

    def check(config=SPARSE, **changes):
        classes = Classes(config, **changes)
        layers = classes.vllm_config.compilation_config.static_forward_context
        monkeypatch.setitem(layers, LAYER, classes.layer)
        with set_current_vllm_config(classes.vllm_config):
            self_check.check_layers(classes.builder, classes.builder.own_layers())
            dtype = torch.uint8 if has_e4m3_cache(classes.impl) else DTYPE
            cache = classes.builder.new_cache(4, 16, 2, 64, dtype, torch.device("cpu"))
        return classes, classes.dense_reason(cache)

    return check


def said_by_us(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "vllm.flashprefill" and r.levelno >= logging.WARNING]


@pytest.mark.parametrize("config", [EXACT, SPARSE, FlashPrefillConfig(alpha=0.1)])
def test_this_vllm_is_as_expected(calls, check, config, caplog):
    calls.clear()
    with counted() as count:
        classes, reason = check(config)
        _, again = check(config)
    assert reason is again is None and said_by_us(caplog) == []
    # Once whole and once the decode alone, for both.
    assert [call["attn_metadata"].num_actual_tokens > 1 for call in calls] == [True, False]
    assert count.stats == counters.Stats(), "it is no request's"
    assert classes.impl.flashprefill_config == classes.builder.flashprefill_config == config
    assert classes.impl._counts is None


@pytest.mark.parametrize("scale", [0.004, 1.0])
@pytest.mark.parametrize("compute_dtype", ["auto", "fp8"])
def test_an_e4m3_cache_is_as_expected(calls, check, monkeypatch, caplog, scale, compute_dtype):
    e4m3(monkeypatch, scale)
    _, reason = check(dataclasses.replace(SPARSE, compute_dtype=compute_dtype), kv_cache_dtype="fp8")
    assert reason is None and said_by_us(caplog) == [] and len(calls) > 0


def test_a_scale_that_is_left_out_is_seen(calls, check, monkeypatch):
    e4m3(monkeypatch, 0.5)
    paged = attention_impl.flash_prefill_paged

    def without(q, kv, *args, **named):
        return paged(q, dataclasses.replace(kv, v_scale=None), *args, **named)

    monkeypatch.setattr(attention_impl, "flash_prefill_paged", without)
    _, reason = check(kv_cache_dtype="fp8")
    assert reason is DenseReason.SELF_CHECK


def e4m3(monkeypatch, scale):
    """vLLM's layers have an e4m3 cache of this scale, and hand on what they do of the query."""
    take_e4m3_caches(monkeypatch)
    made = Classes.__init__

    def with_scales(self, *args, **changes):
        made(self, *args, **changes)
        self.layer._k_scale = self.layer._v_scale = torch.tensor(scale)
        self.layer.query_quant = None
        if has_quantised_query(self.impl):
            self.layer.query_quant = lambda q, scale: ((q.float() / scale).to(torch.float8_e4m3fn), scale)

    monkeypatch.setattr(Classes, "__init__", with_scales)


@pytest.mark.parametrize("version, compared", [("0.24.0", True), ("0.24.0+cu129", True), ("0.24.1", False)])
def test_releases_that_were_compared_on_a_gpu(monkeypatch, version, compared):
    monkeypatch.setattr("vllm.__version__", version)
    assert self_check.compared_on_gpu() is compared


def test_a_layer_that_is_dense_anyway_is_not_checked(calls, check):
    calls.clear()
    _, reason = check(sliding_window=64)
    assert reason is DenseReason.SLIDING_WINDOW and calls == []


def other_order(impl, monkeypatch):
    paged_kv = impl.paged_kv
    monkeypatch.setattr(impl, "paged_kv", lambda self, cache: paged_kv(self, cache)[::-1])


def not_written(impl, monkeypatch):
    monkeypatch.setattr(impl, "write_kv", lambda *_: None)
    monkeypatch.setattr(impl, "do_kv_cache_update", lambda *_: None, raising=False)


def other_scale(impl, monkeypatch):
    paged = attention_impl.flash_prefill_paged

    def wrong(*args, softmax_scale, **named):
        return paged(*args, softmax_scale=1.5 * softmax_scale, **named)

    monkeypatch.setattr(attention_impl, "flash_prefill_paged", wrong)


def raising(impl, monkeypatch):
    def forward(*_, **__):
        raise TypeError("forward() takes a new argument")

    monkeypatch.setattr(impl, "vllm_forward", forward)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_order, "what is written into its cache is not what is read from it"),
        (not_written, "what is written into its cache is not what is read from it"),
        (other_scale, "attention that keeps every block differs from vLLM's own by "),
        (raising, "TypeError: forward() takes a new argument"),
    ],
)
def test_a_vllm_that_is_not_as_expected_serves_dense(calls, check, spoil, said, strict, monkeypatch, caplog):
    spoil(type(Classes(SPARSE).impl), monkeypatch)
    line = f"FlashPrefill: layers with 4/2 heads of 64 stay dense, since this vLLM is not as expected: {said}"
    monkeypatch.setenv("FLASHPREFILL_STRICT", str(int(strict)))
    if strict:
        with pytest.raises(RuntimeError) as error:
            check()
        assert str(error.value).startswith(line)
        return
    for _ in range(2):
        _, reason = check()
        assert reason is DenseReason.SELF_CHECK
    (said,) = said_by_us(caplog)
    assert said.startswith(line)


def test_an_unknown_batch_serves_dense(calls, check, monkeypatch, caplog):
    classes = Classes(SPARSE)
    known = self_check.batch_class(type(classes.builder))
    newer = dataclasses.make_dataclass("Newer", [("kinds", object)], bases=(known,), kw_only=True)
    monkeypatch.setattr(self_check, "batch_class", lambda _: newer)
    _, reason = check()
    assert reason is DenseReason.SELF_CHECK
    (said,) = said_by_us(caplog)
    assert "missing 1 required keyword-only argument: 'kinds'" in said


def test_an_engine_whose_steps_are_too_short_is_not_checked(calls, check, monkeypatch):
    classes = Classes(SPARSE)
    monkeypatch.setattr(classes.vllm_config.scheduler_config, "max_num_batched_tokens", 300)
    calls.clear()
    _, reason = check()
    assert reason is None and calls == []


def test_a_dense_layer_does_not_stand_for_its_kind(calls, check, monkeypatch, caplog):
    other_scale(type(Classes(SPARSE).impl), monkeypatch)
    check(dataclasses.replace(SPARSE, num_dense_layers=5))
    assert "stay dense, since this vLLM is not as expected" in caplog.text
