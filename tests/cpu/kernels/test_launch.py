"""Which of its kernels stage 4 launches, and what is said where that is not the fastest."""

import dataclasses
import json
import logging
import re
import types

import pytest
import torch

sparse_attention = pytest.importorskip("vllm_flashprefill.kernels.sparse_attention")
from vllm_flashprefill.kernels import descriptors  # noqa: E402

if descriptors.TensorDescriptor is None:
    pytest.skip("this Triton has no tensor descriptors", allow_module_level=True)

from tests.cpu.kernels.test_interpreted import IMPORTS, needs_triton, run_interpreted  # noqa: E402
from vllm_flashprefill.kernels import configs  # noqa: E402
from vllm_flashprefill.kernels.schedule import Slab  # noqa: E402
from vllm_flashprefill.key_values import KeyValues  # noqa: E402

GLUON, TMA, PLAIN = (
    table["hopper", 128] for table in (configs.ATTENTION_GLUON, configs.ATTENTION_TMA, configs.ATTENTION)
)


@pytest.fixture
def launched(monkeypatch):
    """The configurations that were launched; those in `launched.broken` do not compile."""

    class Launched(list):
        broken = ()

    done = Launched()

    def launch(config, *_):
        if config in done.broken:
            raise ValueError("no such builtin")
        done.append(config)

    monkeypatch.setattr(sparse_attention, "_launch", launch)
    monkeypatch.setattr(sparse_attention, "attention_configs", lambda *_: (GLUON, TMA, PLAIN))
    monkeypatch.setattr(sparse_attention, "hopper", object())
    monkeypatch.setattr(sparse_attention, "_broken", set())
    monkeypatch.setattr(sparse_attention, "_warned", set())
    return done


def cache(page_size=128, dtype=torch.bfloat16, pad=0):
    keys_and_values = torch.zeros(4, page_size, 2, 256 + pad, dtype=dtype)
    return KeyValues(*keys_and_values[..., :256].split(128, dim=-1), torch.zeros(1, 4, dtype=torch.int32))


def attend(kv, **options):
    q = torch.zeros(1, 5, 4, 128, dtype=torch.bfloat16)
    sparse_attention.sparse_attention(
        q, kv, None, Slab(0, 1, 0, 4), lists=None, counts=None, softmax_scale=1.0, out=q, **options
    )


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_fastest_is_launched_without_a_word(launched, caplog):
    attend(cache(16))
    assert launched == [GLUON] and said(caplog) == []


def test_a_kernel_that_does_not_compile_is_said_once(launched, caplog):
    launched.broken = (GLUON,)
    for _ in range(3):
        attend(cache())
    assert launched == [TMA] * 3
    (warning,) = said(caplog)
    assert "heads of 128 take a slower kernel than the Hopper one: ValueError: no such builtin" in warning


def test_the_last_kernel_is_never_dead(launched, caplog):
    launched.broken = (GLUON, TMA)
    attend(cache())
    attend(cache())
    assert launched == [PLAIN] * 2 and len(said(caplog)) == 2
    launched.broken = (GLUON, TMA, PLAIN)
    with pytest.raises(ValueError, match="no such builtin"):
        attend(cache())


def test_a_triton_without_the_hopper_kernel_is_said_once(launched, caplog, monkeypatch):
    monkeypatch.setattr(sparse_attention, "hopper", None)
    attend(cache())
    attend(cache())
    assert launched == [TMA] * 2
    (warning,) = said(caplog)
    assert "slower kernel than the Hopper one: Triton" in warning and "has no Gluon" in warning


def test_strides_that_are_no_matrix_are_said_once_for_each_kernel(launched, caplog):
    for pages in (4, 5):
        odd = cache(pad=2)
        attend(dataclasses.replace(odd, k=odd.k[:pages], v=odd.v[:pages]))
    assert launched == [PLAIN] * 2
    assert len(said(caplog)) == 2
    for warning in said(caplog):
        assert "of keys or values, the strides (66048, 516, 258, 1) of torch.bfloat16 have tokens that do" in warning


def test_pages_shorter_than_a_tile_are_said(launched, caplog, monkeypatch):
    monkeypatch.setattr(sparse_attention, "attention_configs", lambda *_: (TMA, PLAIN))
    attend(cache(16))
    assert launched == [PLAIN]
    (warning,) = said(caplog)
    assert "its tiles of 64 tokens need pages of a multiple of that, not of 16" in warning


def test_a_kernel_that_does_not_compile_for_e4m3_is_kept_for_the_rest(launched, caplog):
    launched.broken = (GLUON,)
    attend(cache(dtype=torch.uint8))
    launched.broken = ()
    attend(cache(dtype=torch.uint8))
    attend(cache())
    assert launched == [TMA, TMA, GLUON] and len(said(caplog)) == 1


def test_products_in_e4m3_are_of_the_hopper_kernel_alone(launched, caplog, monkeypatch):
    queries = torch.zeros(1, 5, 4, 128, dtype=torch.bfloat16)
    e4m3 = cache(dtype=torch.uint8)
    assert sparse_attention.takes_fp8_products(queries, e4m3)
    assert not sparse_attention.takes_fp8_products(queries, cache())
    assert said(caplog) == []
    # One that did not compile is not asked for again, and the 16-bit ones are as they were.
    launched.broken = (GLUON,)
    attend(e4m3, value_tiles=torch.zeros(1))
    assert not sparse_attention.takes_fp8_products(queries, e4m3)
    launched.broken = ()
    attend(e4m3)
    assert launched == [TMA, GLUON] and len(said(caplog)) == 1
    monkeypatch.setattr(sparse_attention, "hopper", None)
    monkeypatch.setattr(sparse_attention, "_broken", set())
    assert not sparse_attention.takes_fp8_products(queries, e4m3)
    assert "heads of 128 take a slower kernel than the e4m3 products one: Triton" in said(caplog)[-1]


def test_values_that_are_no_words_are_multiplied_in_16_bits(launched, caplog):
    k, v = torch.zeros(2, 20_000, dtype=torch.uint8).unbind()
    k, v = (x.as_strided((4, 16, 1, 128), (4352, 272, 130, 1)) for x in (k, v))
    kv = KeyValues(k, v, torch.zeros(1, 4, dtype=torch.int32))
    assert not sparse_attention.takes_fp8_products(torch.zeros(1, 5, 4, 128), kv)
    assert "values have the strides (4352, 272, 130, 1), no multiples of 4" in said(caplog)[-1]


@pytest.mark.parametrize("module", ["hopper", "hopper_e4m3", "hopper_fp8"])
def test_constants_of_a_kernel_can_be_written_as_json(module, monkeypatch):
    """As vLLM's watch on compilation has Triton do, whose failure would look like one of the kernel."""
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: given.update(constants)

    module = getattr(sparse_attention, module)
    (name,) = (name for name in vars(module) if re.fullmatch(r"_sparse_attention_hopper(_e4m3|_fp8)?_kernel", name))
    monkeypatch.setattr(module, name, Kernel())
    e4m3 = module is not sparse_attention.hopper
    kv = cache(dtype=torch.uint8 if e4m3 else torch.bfloat16)
    q = torch.zeros(1, 5, 4, 128, dtype=torch.uint8 if e4m3 else torch.bfloat16)
    schedule = types.SimpleNamespace(requests=None, items=None, counters=torch.zeros(2))
    tiles = torch.zeros(2, 4, 128, 128, dtype=torch.uint8) if module is sparse_attention.hopper_fp8 else None
    out, slab = torch.zeros(q.shape, dtype=torch.bfloat16), Slab(0, 1, 0, 4)
    sparse_attention._launch(GLUON, q, kv, schedule, slab, None, None, None, 1.0, None, None, out, tiles)
    assert given["HEAD_SIZE"] == 128 and json.loads(json.dumps(given)) == given


@needs_triton
@pytest.mark.parametrize("heads_first", [False, True])
def test_tensor_descriptors_interpreted(heads_first):
    """Heads beside each other, a token's keys and values together; and one head's page below the other's."""
    run_interpreted(
        IMPORTS
        + f"""
from tests.support import kernel_cases
from vllm_flashprefill.kernels.configs import AttentionConfig

sparse_attention = kernel_cases.sparse_attention
kernel_cases.sparse_attention = lambda *args, **named: sparse_attention(
    *args, **named, launch=AttentionConfig(64, 4, 1, tma=True))
config = sparse_config(alpha=0.3)
batch = make_batch(config=config, page_size=64, requests=[Request(300, 340, 128), Request(129)], beside=True,
                   heads_first={heads_first})
check_all(batch, config, 0.125)
"""
    )
