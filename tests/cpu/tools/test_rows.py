import csv
import subprocess

import pytest

from tools import rows
from tools.rows import append_row, kernel_rows, length_name, ttft_rows

COLUMNS = ("gpu", "vllm", "model", "case", "tokens", "chunk", "check", "flash_ms")


@pytest.fixture
def table(tmp_path):
    def write(*rows):
        path = tmp_path / "vllm.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        return path

    return write


def test_newest_passed_row_of_each_length_and_chunk(table):
    path = table(
        ("H100", "0.24.0", "8b", "ttft", 32768, 0, "passed", 1),
        ("H100", "0.24.0", "8b", "ttft", 1024, 0, "passed", 2),
        ("H100", "0.24.0", "8b", "ttft", 32768, 8192, "passed", 3),
        ("H100", "0.24.0", "8b", "decode", 1024, 0, "passed", 4),
        ("H100", "0.24.0", "8b", "ttft", 32768, 0, "passed", 5),
        ("H100", "0.24.0", "8b", "ttft", 1024, 0, "failed", 6),
    )
    chunks = ttft_rows(path, None)
    assert {chunk: [row["flash_ms"] for row in rows] for chunk, rows in chunks.items()} == {0: ["2", "5"], 8192: ["3"]}


def test_one_gpu_vllm_and_model(table):
    path = table(
        ("H100", "0.24.0", "8b", "ttft", 1024, 0, "passed", 1),
        ("H200", "0.12.0", "8b", "ttft", 2048, 0, "passed", 2),
        ("H200", "0.24.0", "4 layers", "ttft", 4096, 0, "passed", 3),
        ("H200", "0.24.0", "8b", "ttft", 8192, 0, "passed", 4),
    )
    assert [row["flash_ms"] for row in ttft_rows(path, None)[0]] == ["4"]
    assert [row["flash_ms"] for row in ttft_rows(path, "H100")[0]] == ["1"]
    assert ttft_rows(path, "A100") == {}


def test_kernel_rows_are_of_caches_in_16_bits_and_one_score(tmp_path):
    shape = dict(heads=32, kv_heads=8, head_size=128, page_size=0, prompts=1, gpu="H100", piece_size=8)
    kinds = [("bf16", "auto", "sum"), ("e4m3", "auto", "sum"), ("e4m3", "fp8", "sum"), ("bf16", "auto", "row")]
    for times, kind in enumerate(kinds, start=1):
        options = dict(zip(("kv_dtype", "compute_dtype", "piece_score"), kind, strict=True))
        append_row(tmp_path / "kernels.csv", dict(shape, tokens=4096, queries=4096, times_fa2=times, **options))
    assert [row["times_fa2"] for row in kernel_rows(tmp_path / "kernels.csv")] == ["4"]


@pytest.mark.parametrize("tokens, name", [(16, "16"), (1024, "1K"), (3072, "3K"), (122880, "120K")])
def test_length_name(tokens, name):
    assert length_name(tokens) == name


def test_a_commit_is_dirty_by_code_and_not_by_rows(tmp_path, monkeypatch):
    code, row = tmp_path / "code.py", tmp_path / "results" / "rows.csv"
    row.parent.mkdir()
    code.write_text("1\n")
    row.write_text("1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(rows, "RESULTS", row.parent)
    monkeypatch.delenv("COMMIT", raising=False)
    clean = rows.commit_name(None)
    row.write_text("2\n")
    assert rows.commit_name(None) == clean
    code.write_text("2\n")
    assert rows.commit_name(None) == f"{clean}-dirty"
