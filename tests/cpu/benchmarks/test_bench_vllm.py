import csv
from types import SimpleNamespace
from unittest import mock

import pytest

# The rows name vLLM's version.
pytest.importorskip("vllm")

from benchmarks.bench_vllm import write_rows

CHECK = dict(check=[{"7": -1.0}], noise=[{"7": -1.001}], start_s=1.0, min_sparse_tokens=4096)


def rows_of(default, flash, tmp_path):
    args = SimpleNamespace(
        commit="abc", csv=tmp_path / "rows.csv", model="llama-8b", layers=4, tensor_parallel=1, pipeline_parallel=1,
        eager=True,
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
