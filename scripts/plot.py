"""Draw the speed of the kernels from scripts/results/kernels.csv: times dense attention, by prompt length.

python scripts/plot.py [--gpu "NVIDIA H100 80GB HBM3"]    writes docs/kernels.png; needs matplotlib
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table_rows(path: Path, gpu: str | None) -> list[dict[str, str]]:
    """The newest row of each length of one GPU: one plain prompt, 32/8 heads of 128, dense timed beside it."""
    with path.open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["heads"], row["kv_heads"], row["head_size"], row["page_size"]) == ("32", "8", "128", "0")
            and row["prompts"] == "1"
            and row["queries"] == row["tokens"]
            and row["times_fa2"]
            and gpu in (None, row["gpu"])
        ]
    gpu = gpu or rows[-1]["gpu"]
    newest = {int(row["tokens"]): row for row in rows if row["gpu"] == gpu}
    return [newest[tokens] for tokens in sorted(newest)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", help="as the CSV names it (default: that of the last row)")
    parser.add_argument("--csv", type=Path, default=ROOT / "scripts/results/kernels.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/kernels.png")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = table_rows(args.csv, args.gpu)
    tokens = [int(row["tokens"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for column, label in (("times_fa2", "FlashAttention-2"), ("times_cudnn", "cuDNN")):
        times = [float(row[column]) for row in rows]
        axes.plot(tokens, times, marker="o", label=f"times {label}")
        for x, y in zip(tokens, times, strict=True):
            axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(tokens, [f"{n // 1024}K\n{float(row['density']):.1%}" for n, row in zip(tokens, rows, strict=True)])
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.set_xlabel("prompt tokens, density")
    axes.set_ylabel("speedup over dense attention")
    axes.set_title(f"FlashPrefill, selection included: {rows[0]['gpu']}, bf16, 32/8 heads of 128", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
