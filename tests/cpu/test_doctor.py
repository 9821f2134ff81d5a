"""`python -m vllm_flashprefill`: what it says, its one line about what is missing, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cpu.backend.test_engine_routing import GEMMA, model
from vllm_flashprefill import __main__ as doctor
from vllm_flashprefill.patches import registration

ROOT = Path(__file__).parents[2]
platforms = pytest.importorskip("vllm.platforms")


@pytest.fixture(autouse=True)
def plain_process(monkeypatch, nothing_shared):
    """No registration before or after, and no options in the environment."""
    for name in ("FLASHPREFILL", "FLASHPREFILL_CODE_OPTIONS", "FLASHPREFILL_ALPHA", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    registration.revert()
    yield
    registration.revert()


@pytest.fixture
def engine(monkeypatch):
    """Has the doctor see an engine of these values instead of a model's folder."""

    def make(cache=None, **changes):
        described = model(**changes)
        text = described.hf_text_config
        described.hf_config = SimpleNamespace(
            model_type=text.model_type, head_dim=described.get_head_size(), text_config=None
        )
        vllm_config = SimpleNamespace(
            model_config=described,
            cache_config=SimpleNamespace(**{"cache_dtype": "auto", "sliding_window": None, **(cache or {})}),
            parallel_config=SimpleNamespace(),
            additional_config={},
        )
        monkeypatch.setattr(doctor, "engine_config", lambda *_: vllm_config)

    return make


def run(capsys, *arguments):
    """Exit status, lines of what it printed, and lines of what went wrong."""
    status = doctor.main(arguments)
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def test_an_installation_that_works(capsys, monkeypatch):
    status, lines, errors = run(capsys)
    assert (status, errors) == (0, [])
    assert lines[0].startswith(f"vllm-flashprefill {doctor.__version__}, Python 3.")
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[0]
    assert lines[1].startswith("vLLM 0.") and "loader patch_loader_vllm_0_" in lines[1]
    assert lines[2].startswith("device: vLLM's CPU engine, ")
    assert lines[3] == "FLASHPREFILL=1 is not set: `vllm serve` is plain vLLM here"
    monkeypatch.setenv("FLASHPREFILL", "1")
    assert run(capsys)[1][3] == "FLASHPREFILL=1 is set"


def fails(capsys, says, *arguments):
    """One line says why, and the status is 1."""
    status, _, errors = run(capsys, *arguments)
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0], errors


def test_no_vllm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    fails(capsys, "needs vLLM, which cannot be imported")


def test_neither_vllm_nor_torch():
    missing = "import runpy, sys\nsys.modules.update(dict.fromkeys(('vllm', 'torch', 'triton', 'transformers')))\n"
    command = [sys.executable, "-c", missing + "runpy.run_module('vllm_flashprefill', run_name='__main__')"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: flashprefill needs vLLM") and done.stderr.count("\n") == 1


def test_a_vllm_that_is_too_old(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.9.2"))
    fails(capsys, "not 0.9.2; install one of")


def test_an_untested_vllm_is_a_warning(capsys, monkeypatch):
    def warn():
        doctor.logging.getLogger("vllm.flashprefill").warning("tested with others")

    monkeypatch.setattr(registration, "register", warn)
    status, lines, errors = run(capsys)
    assert (status, errors) == (0, []) and "warning: tested with others" in lines


def platform(kind, **answers):
    kinds = {f"is_{name}": lambda name=name: name == kind for name in ("cpu", "cuda", "unspecified")}
    return SimpleNamespace(**kinds, **answers)


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(platforms, "current_platform", platform("unspecified"), raising=False)
    fails(capsys, "vLLM finds no GPU here")


def test_a_gpu_that_is_too_old(capsys, monkeypatch):
    volta = platform(
        "cuda",
        get_device_name=lambda: "Tesla V100",
        get_device_capability=lambda: SimpleNamespace(major=7, minor=0),
        has_device_capability=lambda _: False,
    )
    monkeypatch.setattr(platforms, "current_platform", volta, raising=False)
    fails(capsys, "compute capability 8.0 (Ampere) or newer, this one has 7.0")


def test_a_device_of_another_kind(capsys, monkeypatch):
    monkeypatch.setattr(platforms, "current_platform", platform("tpu", device_name="tpu"), raising=False)
    fails(capsys, "runs on NVIDIA GPUs and CPUs, not on tpu")


def test_a_bad_option_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "much")
    fails(capsys, "FLASHPREFILL_ALPHA must be a number, not 'much'")
    monkeypatch.delenv("FLASHPREFILL_ALPHA")
    monkeypatch.setenv("FLASHPREFILL", "yes")
    fails(capsys, "FLASHPREFILL must be 0 or 1, not 'yes'")


def test_a_package_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(registration.importlib.metadata, "entry_points", lambda **_: [])
    fails(capsys, "the package is not installed")


def test_a_folder_without_a_config(capsys, tmp_path):
    fails(capsys, "it has no config.json", "--model", str(tmp_path))


def test_a_config_that_vllm_refuses(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of another world"}))
    status, _, errors = run(capsys, "--model", str(tmp_path))
    assert status == 1 and len(errors) == 1 and "of another world" in errors[0]


def test_arguments_of_vllm_need_a_model(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--max-model-len", "9000"])
    assert ended.value.code == 2 and "--max-model-len goes with --model" in capsys.readouterr().err


def test_a_model_whose_layers_are_all_sparse(capsys, engine):
    engine()
    status, lines, errors = run(capsys, "--model", "M")
    assert (status, errors) == (0, [])
    assert lines[-4] == "model: llama, heads of 128, M"
    assert "alpha 0.73, block_size 128" in lines[-3]
    assert lines[-2:] == [
        "layers 0-3: sparse",
        "prompts: sparse from 4096 tokens on; a sequence has at most 32768",
    ]


def test_the_preset_where_there_is_one(capsys, engine, monkeypatch):
    engine()
    monkeypatch.setenv("FLASHPREFILL_PIECE_SIZE", "0")
    _, lines, _ = run(capsys, "--model", "M")
    assert "alpha 0.18, block_size 128" in lines[-4]
    assert lines[-3] == "preset for llama with heads of 128: alpha 0.18"


def test_layers_by_reason(capsys, engine, monkeypatch):
    engine(hf={**GEMMA, "model_type": "gemma3"})
    status, lines, _ = run(capsys, "--model", "M")
    assert status == 0
    assert lines[-3:-1] == ["layers 0-2: dense, sliding_window", "layers 3: sparse"]
    registration.revert()
    monkeypatch.setenv("FLASHPREFILL_NUM_DENSE_LAYERS", "1")
    engine(hf={"layer_types": ["full_attention", "linear_attention"] * 2, "num_kv_shared_layers": 1})
    assert run(capsys, "--model", "M")[1][-4:-1] == [
        "layers 0: dense, dense_layer",
        "layers 1, 3: dense, linear_attention",
        "layers 2: sparse",
    ]


@pytest.mark.parametrize(
    "changes, layers, says",
    [
        ({"max_model_len": 4096}, "layers 0-3: dense, as all of this engine", "raise --max-model-len"),
        ({"use_mla": True}, "layers 0-3: dense, as all of this engine", "MLA"),
        ({"hf": {"attn_logit_softcapping": 50.0}}, "layers 0-3: dense, logits_soft_cap", "caps its logits"),
        ({"hf": {"model_type": "bloom"}}, "layers 0-3: dense, alibi", "ALiBi"),
        ({"cache": {"sliding_window": 512}}, "layers 0-3: dense, sliding_window", "a sliding window of 512 tokens"),
        ({"hf": {"num_hidden_layers": None}, "use_mla": True}, "layers: the model's config does not say", "MLA"),
    ],
    ids=str,
)
def test_where_nothing_would_be_sparse_the_status_is_1(capsys, engine, changes, layers, says):
    engine(**changes)
    status, lines, errors = run(capsys, "--model", "M")
    assert status == 1 and lines[-1].startswith(layers)
    assert len(errors) == 1 and errors[0].startswith("error: nothing would be sparse: ") and says in errors[0]


def test_ranges():
    assert doctor.ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert doctor.ranges([]) == ""


def test_an_error_of_pydantic_is_the_line_that_says_what_is_wrong():
    error = ValueError(
        "1 validation error for ModelConfig\n  Value error, no such model [type=value_error, input=1]\n  more"
    )
    assert doctor.one_line(error) == "no such model"
    assert doctor.one_line(RuntimeError("")) == "RuntimeError"
