"""The needle tasks of a result, drawn by length and depth."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: the mean score of each setting, and below it the difference to dense; each cell with its prompts."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the heat map needs matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["samples"] if row["depth"] is not None]
    if not rows:
        sys.exit("error: this result has no task with a depth, so there is nothing to draw")
    names = list(dict.fromkeys(name for row in rows for name in row["answers"]))
    # Of a run that ended early, what all settings have answered.
    rows = [row for row in rows if len(row["answers"]) == len(names)]
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    cells = {
        (depth, length): [row["answers"] for row in rows if (row["depth"], row["length"]) == (depth, length)]
        for depth in depths
        for length in lengths
    }
    size = (1.5 + len(names) * (0.6 + 0.75 * len(lengths)), 6.4)
    figure, axes = pyplot.subplots(2, len(names), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        for line, (base, colours, low) in enumerate(((None, "RdYlGn", 0), ("dense", "RdBu", -1))):
            axis = axes[line][column]
            if name == base:
                axis.set_axis_off()
                continue

            def value(answers: dict[str, Any], name: str = name, base: str | None = base) -> float:
                return answers[name]["score"] - (answers[base]["score"] if base else 0)

            grid = [
                [
                    statistics.mean(map(value, cells[depth, length])) if cells[depth, length] else float("nan")
                    for length in lengths
                ]
                for depth in depths
            ]
            axis.imshow(grid, cmap=colours, vmin=low, vmax=1, aspect="auto", alpha=0.7)
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    if cells[depth, length]:
                        label = f"{grid[y][x]:.2f}\nof {len(cells[depth, length])}"
                        axis.text(x, y, label, ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axis.set_title(f"{name} - dense" if base else name, fontsize=9)
            if line:
                axis.set_xlabel("prompt tokens")
    axes[0][0].set_ylabel("fact at")
    figure.suptitle(f"{result['model']}: needles found")
    figure.savefig(path, dpi=120, metadata={"Software": None})
