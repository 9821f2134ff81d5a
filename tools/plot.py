"""The plots of the docs, from rows of results/*.csv; drawing needs matplotlib, asking what is drawn does not."""

from __future__ import annotations

import hashlib
import inspect
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tools.rows import RESULTS, Row, append_rows, kernel_rows, length_name, ttft_rows

GPU = "NVIDIA H100 80GB HBM3"
# Of the rows with pieces.
KERNELS_GPU = "NVIDIA H200"
# What a PNG calls the hash of what it was drawn from, and how.
KEY = "rows"


def draw_kernels(axes, rows: list[Row]) -> None:
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
    axes.margins(y=0.1)
    axes.set_title(f"FlashPrefill, selection included: {rows[0]['gpu']}, bf16, 32/8 heads of 128", fontsize=10)
    axes.legend()


def draw_ttft(axes, chunks: dict[int, list[Row]]) -> None:
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
            text = f"{float(row['default_ms']) / float(row['flash_ms']):.2f}x"
            axes.annotate(text, at, textcoords="offset points", xytext=(4, -11), fontsize=8, color="C1")
    tokens = sorted({int(row["tokens"]) for rows in chunks.values() for row in rows})
    named = [n for n in tokens if n.bit_count() == 1 or n == tokens[-1]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(named, [length_name(n) for n in named], fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to first token, ms")
    axes.margins(x=0.08, y=0.08)
    row = next(iter(chunks.values()))[0]
    axes.set_title(f"{row['model']}: {row['gpu']}, vLLM {row['vllm']}, published densities imposed", fontsize=10)
    axes.legend(fontsize=8)


def draw_appends(axes, rows: list[Row]) -> None:
    """Dotted: with attention left out altogether."""
    for color, cached in enumerate(sorted({int(row["cached"]) for row in rows})):
        found = [row for row in rows if int(row["cached"]) == cached]
        tokens = [int(row["tokens"]) for row in found]
        best = [float(row["default_ms"]) / float(row["bound_ms"]) for row in found]
        label = f"over {length_name(cached)} cached"
        axes.plot(tokens, [float(row["speedup"]) for row in found], marker="o", color=f"C{color}", label=label)
        axes.plot(tokens, best, linestyle=":", color=f"C{color}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [length_name(n) for n in tokens])
    axes.set_xlabel("new tokens")
    axes.set_ylabel("TTFT, default backend's over FlashPrefill's")
    row = rows[0]
    axes.set_title(f"{row['model']}: {row['gpu']}, vLLM {row['vllm']}, published densities imposed", fontsize=10)
    axes.legend(fontsize=8)


PLOTS = {
    "docs/appends.png": (draw_appends, lambda: append_rows(RESULTS / "vllm.csv")),
    "docs/kernels.png": (draw_kernels, lambda: kernel_rows(RESULTS / "kernels.csv", KERNELS_GPU)),
    "docs/ttft.png": (draw_ttft, lambda: ttft_rows(RESULTS / "vllm.csv", GPU, "0.24.0", "llama-8b, 32 layers")),
}


def digest(name: str) -> str:
    """Of a plot's rows and of how they are drawn."""
    drawer, read = PLOTS[name]
    return hashlib.sha256(json.dumps([read(), inspect.getsource(drawer)], sort_keys=True).encode()).hexdigest()


def png_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The keywords and texts that a PNG carries."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"tEXt":
            keyword, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
            yield keyword.decode("latin-1"), text.decode("latin-1")
        at += length + 12


def is_current(name: str, path: Path) -> bool:
    return path.exists() and dict(png_texts(path)).get(KEY) == digest(name)


def draw(name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawer, read = PLOTS[name]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    drawer(axes, read())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, metadata={KEY: digest(name)})
