from unittest import mock

import pytest
import torch

from vllm_flashprefill.kernels import configs

fp8 = pytest.importorskip("vllm_flashprefill.kernels.fp8", reason="Triton is not installed", exc_type=ImportError)

KINDS = {"ampere", "small", "hopper", "blackwell"}


@pytest.mark.parametrize(
    "capability, kind, e4m3",
    [
        ((8, 0), "ampere", False),
        ((8, 6), "small", False),
        ((8, 7), "ampere", False),
        ((8, 9), "small", True),
        ((9, 0), "hopper", True),
        ((10, 0), "blackwell", True),
        ((12, 0), "small", True),
        ((12, 1), "small", True),
    ],
)
def test_kind_of_a_gpu(capability, kind, e4m3):
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
