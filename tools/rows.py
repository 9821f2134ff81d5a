"""Rows of results/*.csv."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def commit_name(given: str | None) -> str:
    """The commit that a row names: the one given, else $COMMIT, else git's."""
    if given or os.environ.get("COMMIT"):
        return given or os.environ["COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
