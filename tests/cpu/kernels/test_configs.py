from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from vllm_flashprefill.kernels import configs, fp8

KINDS = {"ampere", "small", "hopper", "blackwell"}


@pytest.mark.parametrize(
    "capability, shared_kib, kind, e4m3",
    [
        ((8, 0), 163, "ampere", False),
        ((8, 6), 99, "small", False),
        ((8, 7), 163, "ampere", False),
        ((8, 9), 99, "small", True),
        ((9, 0), 227, "hopper", True),
        ((10, 0), 227, "blackwell", True),
        ((12, 0), 99, "small", True),
    ],
)
def test_kind_of_a_gpu(capability, shared_kib, kind, e4m3, monkeypatch):
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared_kib << 10})
    monkeypatch.setattr(configs.triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    device = torch.device("cuda", 0)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        assert configs.gpu_kind.__wrapped__(device) == kind
        assert fp8.has_e4m3_instruction.__wrapped__(device) == e4m3


def test_each_kind_has_tiles_for_each_head_size():
    assert (
        configs.ATTENTION.keys() == configs.SELECT.keys() == {(kind, size) for kind in KINDS for size in (64, 128, 256)}
    )
    for table in (configs.ATTENTION_TMA, configs.ATTENTION_GLUON, configs.SELECT_PIECES):
        assert table.keys() <= configs.ATTENTION.keys()


def test_the_interpreter_takes_tiles_without_descriptors():
    assert configs.gpu_kind(torch.device("cpu")) == "ampere"
    assert not fp8.has_e4m3_instruction(torch.device("cpu"))
    assert [config.tma for config in configs.attention_configs(torch.device("cpu"), 128)] == [False]
