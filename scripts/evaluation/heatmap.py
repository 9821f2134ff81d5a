"""The needle tasks of a result, drawn by length and depth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: the mean score dense, sparse, and the difference, in each cell with its number of prompts."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: the heat map needs matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["samples"] if row["depth"] is not None]
    if not rows:
        sys.exit("error: this result has no task with a depth, so there is nothing to draw")
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, axes = pyplot.subplots(1, 3, figsize=(3 + 2.1 * len(lengths), 3.6), sharey=True, layout="constrained")
    panels = {
        "dense": (lambda row: row["dense"]["score"], "RdYlGn", 0),
        "FlashPrefill": (lambda row: row["sparse"]["score"], "RdYlGn", 0),
        "difference": (lambda row: row["sparse"]["score"] - row["dense"]["score"], "RdBu", -1),
    }
    for axis, (title, (value, colours, low)) in zip(axes, panels.items(), strict=True):
        cells = [
            [[value(row) for row in rows if (row["depth"], row["length"]) == (depth, length)] for length in lengths]
            for depth in depths
        ]
        means = [[sum(cell) / len(cell) if cell else float("nan") for cell in line] for line in cells]
        axis.imshow(means, cmap=colours, vmin=low, vmax=1, aspect="auto", alpha=0.7)
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                if cell:
                    axis.text(x, y, f"{means[y][x]:.2f}\nof {len(cell)}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("prompt tokens")
        axis.set_title(title)
    axes[0].set_ylabel("fact at")
    figure.suptitle(f"{result['model']}: needles found")
    figure.savefig(path, dpi=120, metadata={"Software": None})
