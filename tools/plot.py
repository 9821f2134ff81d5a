"""Draw what scripts/results/*.csv hold; needs matplotlib.

python scripts/plot.py           docs/kernels.png: the kernels against dense attention, by prompt length
python scripts/plot.py --ttft    docs/ttft.png: time to the first token in vLLM, by prompt length
python scripts/plot.py --gpu "NVIDIA H100 80GB HBM3"
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def kernel_rows(path: Path, gpu: str | None) -> list[dict[str, str]]:
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
    if not rows:
        return []
    gpu = rows[-1]["gpu"]
    newest = {int(row["tokens"]): row for row in rows if row["gpu"] == gpu}
    return [newest[tokens] for tokens in sorted(newest)]


def ttft_rows(path: Path, gpu: str | None) -> dict[int, list[dict[str, str]]]:
    """By tokens of a chunk (0: whole prompts) the newest row of each length whose check passed, shortest first.

    All are of one GPU, one vLLM and one model, those of the last such row.
    """
    with path.open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["case"] == "ttft" and row["check"] == "passed" and gpu in (None, row["gpu"])
        ]
    if not rows:
        return {}
    setting = ("gpu", "vllm", "model")
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in setting)]
    newest = {(int(row["chunk"]), int(row["tokens"])): row for row in rows}
    chunks: dict[int, list[dict[str, str]]] = {}
    for chunk, tokens in sorted(newest):
        chunks.setdefault(chunk, []).append(newest[chunk, tokens])
    return chunks


def length_name(tokens: int) -> str:
    return str(tokens) if tokens < 1024 else f"{tokens / 1024:g}K"


def draw_kernels(axes, rows: list[dict[str, str]]) -> None:
    tokens = [int(row["tokens"]) for row in rows]
    for column, label in (("times_fa2", "FlashAttention-2"), ("times_cudnn", "cuDNN")):
        times = [float(row[column]) for row in rows]
        axes.plot(tokens, times, marker="o", label=f"times {label}")
        for x, y in zip(tokens, times, strict=True):
            axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(tokens, [f"{n // 1024}K\n{float(row['density']):.1%}" for n, row in zip(tokens, rows, strict=True)])
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_xlabel("prompt tokens, density")
    axes.set_ylabel("speedup over dense attention")
    axes.set_title(f"FlashPrefill, selection included: {rows[0]['gpu']}, bf16, 32/8 heads of 128", fontsize=10)
    axes.legend()


def draw_ttft(axes, chunks: dict[int, list[dict[str, str]]]) -> None:
    lines = (
        ("default_ms", "vLLM's default backend", "C0"),
        ("flash_ms", "FlashPrefill", "C1"),
        ("bound_ms", "attention left out", "C7"),
    )
    for chunk, rows in chunks.items():
        for column, label, color in lines:
            # The attention-free time was measured with whole prompts; rows of chunks repeat it.
            points = [(int(row["tokens"]), float(row[column])) for row in rows if row[column]]
            if not points or (chunk and column == "bound_ms"):
                continue
            style = {"linestyle": "--", "marker": "."} if chunk else {"marker": "o"}
            name = f"{label}, chunks of {chunk}" if chunk else label
            axes.plot(*zip(*points, strict=True), color=color, label=name, **style)
    for row in chunks.get(0, []):
        if int(row["tokens"]) >= int(row["min_sparse_tokens"]):
            at = (int(row["tokens"]), float(row["flash_ms"]))
            text = f"{float(row['speedup']):.2f}x"
            axes.annotate(text, at, textcoords="offset points", xytext=(4, -11), fontsize=8, color="C1")
    tokens = sorted({int(row["tokens"]) for rows in chunks.values() for row in rows})
    named = [n for n in tokens if n.bit_count() == 1 or n == tokens[-1]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(named, [length_name(n) for n in named], fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to first token, ms")
    axes.margins(x=0.08)
    row = next(iter(chunks.values()))[0]
    axes.set_title(f"{row['model']}: {row['gpu']}, vLLM {row['vllm']}, published densities imposed", fontsize=10)
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ttft", action="store_true", help="draw vllm.csv instead of kernels.csv")
    parser.add_argument("--gpu", help="as the CSV names it (default: that of the last row)")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    table, picture = ("vllm.csv", "ttft.png") if args.ttft else ("kernels.csv", "kernels.png")
    path = args.csv or ROOT / "scripts/results" / table
    out = args.out or ROOT / "docs" / picture
    rows = (ttft_rows if args.ttft else kernel_rows)(path, args.gpu)
    if not rows:
        parser.error(f"{path} has no row to draw")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    (draw_ttft if args.ttft else draw_kernels)(axes, rows)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
