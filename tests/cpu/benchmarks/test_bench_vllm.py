import csv
import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

# The rows name vLLM's version.
pytest.importorskip("vllm")

from benchmarks import bench_vllm
from benchmarks.bench_vllm import CONFIG, SHAPES, agree, model_name, write_rows

CHECK = dict(check=[{"7": -1.0}], noise=[{"7": -1.001}], start_s=1.0, min_sparse_tokens=4096)


def rows_of(default, flash, tmp_path):
    args = SimpleNamespace(
        commit="abc", csv=tmp_path / "rows.csv", model="llama-8b", layers=4, tensor_parallel=1, pipeline_parallel=1,
        eager=True, kv_cache_dtype="auto", compute_dtype="auto",
    )  # fmt: skip
    with mock.patch("torch.cuda.get_device_name", return_value="a GPU"):
        write_rows(CHECK | default, CHECK | flash, args)
    with args.csv.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_appends(tmp_path):
    case = "append 1024 8192 32768"
    flash = {case: {"ms": 50.0, "density": 0.2}, case.replace("append", "bound"): {"ms": 20.0, "density": None}}
    (row,) = rows_of({case: {"ms": 75.0}}, flash, tmp_path)
    expected = dict(case="append", tokens="1024", cached="32768", chunk="8192", density="0.2", requests="1")
    expected |= dict(default_ms="75.0", flash_ms="50.0", bound_ms="20.0", speedup="1.5", check="passed")
    assert row == row | expected


def test_rows_of_prompts_and_of_decode_steps(tmp_path):
    default = {"ttft 32768 0": {"ms": 30.0}, "ttft 32768 8192": {"ms": 32.0}, "decode 16 1024": {"ms": 5.0}}
    flash = {case: {"ms": 10.0, "density": None} for case in [*default, "bound 32768 0"]}
    whole, chunked, decode = rows_of(default, flash, tmp_path)
    assert (whole["tokens"], whole["chunk"], whole["cached"], whole["bound_ms"]) == ("32768", "0", "0", "10.0")
    assert (chunked["tokens"], chunked["chunk"], chunked["speedup"]) == ("32768", "8192", "3.2")
    assert (decode["requests"], decode["tokens"], decode["chunk"], decode["bound_ms"]) == ("16", "1024", "0", "")


class Stopped(Exception):
    pass


def started(monkeypatch, *arguments):
    """(arguments of each backend's engine, options that FlashPrefill was registered with); children run here."""
    engines, registered = [], []

    def run(command, env, check):
        at = command.index("benchmarks.bench_vllm")
        monkeypatch.setattr(sys, "argv", command[at:])
        with pytest.raises(Stopped):
            bench_vllm.main()

    def start(*arguments, **options):
        engines.append(options)
        raise Stopped

    monkeypatch.setattr("vllm.LLM", start)
    monkeypatch.setattr("vllm_flashprefill.register", lambda **options: registered.append(options))
    monkeypatch.setattr(bench_vllm.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_vllm", *arguments])
    bench_vllm.main()
    return engines, registered


@pytest.mark.parametrize("cache, compute", [("auto", "auto"), ("fp8", "auto"), ("fp8", "fp8")])
def test_both_engines_have_the_cache_and_flashprefill_the_option(cache, compute, monkeypatch):
    engines, registered = started(monkeypatch, "--kv-cache-dtype", cache, "--compute-dtype", compute)
    assert [engine["kv_cache_dtype"] for engine in engines] == [cache, cache]
    assert registered == [dict(max_density=1.0, compute_dtype=compute)]


def test_fp8_products_need_an_fp8_cache(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        started(monkeypatch, "--compute-dtype", "fp8")
    assert "is for --kv-cache-dtype fp8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "cache, compute, end",
    [("auto", "auto", ""), ("fp8", "auto", ", fp8 cache"), ("fp8", "fp8", ", fp8 cache, fp8 products")],
)
def test_rows_name_the_cache_and_the_products(cache, compute, end):
    args = SimpleNamespace(
        model="qwen3-30b-a3b", layers=24, tensor_parallel=1, pipeline_parallel=1, eager=False, kv_cache_dtype=cache,
        compute_dtype=compute,
    )  # fmt: skip
    assert model_name(args) == f"qwen3-30b-a3b, 24 layers{end}"


def test_what_an_fp8_cache_may_move():
    def passed(error, cache, compute, shared=20):
        check = [{str(token): -5.0 for token in range(20)}]
        noise = [{token: lp + 0.02 for token, lp in check[0].items()}]
        found = [{str(token): -5.0 + error for token in range(20 - shared, 40 - shared)}]
        args = SimpleNamespace(kv_cache_dtype=cache, compute_dtype=compute)
        return agree(dict(check=check, noise=noise), dict(check=found), args)

    assert passed(0.055, "auto", "auto") and not passed(0.065, "auto", "auto")
    assert passed(0.135, "fp8", "auto") and not passed(0.145, "fp8", "auto")
    assert passed(0.175, "fp8", "fp8") and not passed(0.185, "fp8", "fp8")
    assert passed(0.0, "auto", "auto", 17) and not passed(0.0, "auto", "auto", 16)
    assert passed(0.0, "fp8", "auto", 15) and not passed(0.0, "fp8", "auto", 14)


@pytest.mark.parametrize("name, billions", [("llama-8b", 8.03), ("llama-70b", 70.55), ("qwen3-30b-a3b", 30.53)])
def test_a_shape_has_its_models_size(name, billions, tmp_path):
    import torch
    import transformers

    def parameters(layers):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **SHAPES[name], "num_hidden_layers": layers}))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert [type(model).__name__] == config.architectures
        return sum(weight.numel() for weight in model.parameters())

    one, two = parameters(1), parameters(2)
    assert (one + (SHAPES[name]["num_hidden_layers"] - 1) * (two - one)) / 1e9 == pytest.approx(billions, abs=0.01)
