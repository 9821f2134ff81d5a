"""Rows of results/*.csv: what benchmarks append, and which of them the tables and plots of the docs show."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, str]


def commit_name(given: str | None) -> str:
    """The commit that a row names: the one given, else $COMMIT, else git's."""
    if given or os.environ.get("COMMIT"):
        return given or os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent)
        return run.stdout.strip()

    # Rows that were just appended change no code.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
    return git("describe", "--always") + "-dirty" * bool(changed)


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path, **equal: str | None) -> list[Row]:
    """The rows whose columns have these values; None stands for any."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(value in (None, row[name]) for name, value in equal.items())]


def newest(rows: list[Row], *columns: str) -> list[Row]:
    """The last row of each combination of these columns' numbers, least numbers first."""
    last = {tuple(int(row[column]) for column in columns): row for row in rows}
    return [last[numbers] for numbers in sorted(last)]


def kernel_rows(path: Path, gpu: str | None = None, piece_size: str = "8") -> list[Row]:
    """The newest row of each length of one GPU: one plain prompt in bf16, 32/8 heads of 128, dense timed beside it."""
    shape = dict(heads="32", kv_heads="8", head_size="128", page_size="0", prompts="1", kv_dtype="bf16")
    plain = dict(**shape, gpu=gpu, piece_size=piece_size, piece_score="row" if piece_size != "0" else None)
    rows = [row for row in read_rows(path, **plain) if row["queries"] == row["tokens"] and row["times_fa2"]]
    return newest([row for row in rows if row["gpu"] == rows[-1]["gpu"]], "tokens")


def ttft_rows(
    path: Path, gpu: str | None = None, vllm: str | None = None, model: str | None = None
) -> dict[int, list[Row]]:
    """By tokens of a chunk (0: whole prompts) the newest row of each length whose check passed, shortest first.

    All are of one GPU, one vLLM and one model, those of the last such row.
    """
    rows = read_rows(path, case="ttft", check="passed", gpu=gpu, vllm=vllm, model=model)
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("gpu", "vllm", "model"))]
    chunks: dict[int, list[Row]] = {}
    for row in newest(rows, "chunk", "tokens"):
        chunks.setdefault(int(row["chunk"]), []).append(row)
    return chunks


def append_rows(path: Path) -> list[Row]:
    """The newest row of each number of new and cached tokens whose check passed, of one GPU, vLLM, model and commit."""
    rows = read_rows(path, case="append", check="passed")
    rows = [
        row for row in rows if all(row[name] == rows[-1][name] for name in ("gpu", "vllm", "model", "chunk", "commit"))
    ]
    return newest(rows, "tokens", "cached")


def length_name(tokens: int) -> str:
    return str(tokens) if tokens < 1024 else f"{tokens / 1024:g}K"
