"""Write the tables and plots of README.md and docs/ from the rows in results/*.csv: `make docs`.

A table stands between `<!-- rows: NAME -->` and `<!-- end -->`; NAME is one of TABLES below. Plots are drawn again
where their rows or their drawing changed, which needs matplotlib. tests/cpu/tools/test_docs.py fails where either is
old.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tools import plot
from tools.plot import GPU
from tools.rows import RESULTS, Row, append_rows, kernel_rows, length_name, newest, read_rows, ttft_rows

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(?<=<!-- rows: )(\S+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def three_digits(value: str | float) -> str:
    """Three significant digits, and all those before the point."""
    return f"{float(value):.{max(0, 2 - math.floor(math.log10(float(value))))}f}"


def density(value: str) -> str:
    return f"{100 * float(value):.{0 if float(value) >= 0.1 else 1}f} %" if value else "dense"


def milliseconds(value: str) -> str:
    return value and f"{float(value):.{0 if float(value) >= 100 else 1}f}"


def table(header: str, lines: Iterable[Iterable[str]]) -> str:
    columns = header.split(" | ")
    return "".join(
        [f"| {header} |\n", f"|{'---|' * len(columns)}\n"]
        + [f"| {' | '.join(line)} |\n".replace("  ", " ") for line in lines]
    )


def kernels_short() -> str:
    published = {row["tokens"]: three_digits(row["times_fa2"]) for row in kernels("0")}
    lines = [kernel_line(row, length(row), "sparse_ms", "times_fa2", "times_cudnn") for row in kernels()]
    return table(
        "prompt tokens | density | ms | times FlashAttention-2 | times cuDNN | published score, times FlashAttention-2",
        [[*line, published.get(row["tokens"], "-")] for line, row in zip(lines, kernels(), strict=True)],
    )


def kernels_whole() -> str:
    numbers = "sparse_ms pool_ms select_ms attend_ms attend_tflops fa2_ms cudnn_ms times_fa2 times_cudnn".split()
    return table(
        "tokens | density | sparse | pool | select | attend | TFLOP/s | FA2 | cuDNN | times FA2 | times cuDNN",
        [kernel_line(row, length(row), *numbers) for row in kernels()],
    )


def kernel_line(row: Row, case: str, *numbers: str) -> list[str]:
    return [case, density(row["density"]), *(three_digits(row[name]) if row[name] else "-" for name in numbers)]


def kernels(piece_size: str = "8") -> list[Row]:
    gpu = plot.KERNELS_GPU if piece_size == "8" else GPU
    return kernel_rows(RESULTS / "kernels.csv", gpu, piece_size)


def kernel_shapes() -> str:
    """What is not one plain prompt with 32/8 heads of 128; all in bf16."""
    columns = ("tokens", "prompts", "queries", "heads", "kv_heads", "head_size", "page_size")
    numbers = ("sparse_ms", "select_ms", "attend_tflops", "times_fa2", "times_cudnn")
    rows = newest(read_rows(RESULTS / "kernels.csv", gpu=GPU, kv_dtype="bf16", piece_size="0"), *columns)
    rows = [row for row in rows if shape(row) != length(row)]
    return table(
        "case | density | sparse | select | TFLOP/s | times FA2 | times cuDNN",
        [kernel_line(row, shape(row), *numbers) for row in rows],
    )


def kernel_e4m3() -> str:
    """The runs that have caches in e4m3 too, each length's newest, beside bf16 of the same run."""
    rows = [row for row in read_rows(RESULTS / "kernels.csv") if row["gpu"] == plot.KERNELS_GPU]
    commits = [row["commit"] for row in rows if row["kv_dtype"] == "e4m3"]
    rows = [row for row in rows if row["commit"] == commits[-1]]
    kinds = {("bf16", "auto"): "bfloat16", ("e4m3", "auto"): "e4m3", ("e4m3", "fp8"): "e4m3, products too"}

    def kind(rows: list[Row], *name: str) -> list[Row]:
        return [row for row in rows if (row["kv_dtype"], row["compute_dtype"]) == name]

    numbers = ("sparse_ms", "pool_ms", "select_ms", "attend_ms", "attend_tflops", "times_fa2", "times_cudnn")
    return table(
        "tokens | density | cache | sparse | pool | select | attend | TFLOP/s | times FA2 | times cuDNN",
        [
            [*line[:2], kinds[row["kv_dtype"], row["compute_dtype"]], *line[2:]]
            for of_length in itertools.zip_longest(*(newest(kind(rows, *name), "tokens") for name in kinds))
            for row in filter(None, of_length)
            for line in [kernel_line(row, shape(row), *numbers)]
        ],
    )


def shape(row: Row) -> str:
    """The case of a kernel's row."""
    heads = row["heads"], row["kv_heads"], row["head_size"]
    if row["prompts"] != "1":
        return f"{row['prompts']} ragged prompts, {int(row['tokens']):,} tokens in all"
    text = length(row)
    if row["queries"] != row["tokens"]:
        text = f"chunk of {length_name(int(row['queries']))} at the end of {text}"
    if heads != ("32", "8", "128"):
        text += ", heads {}/{} of {}".format(*heads)
    return text + f", pages of {row['page_size']}" * (row["page_size"] != "0")


def length(row: Row) -> str:
    return length_name(int(row["tokens"]))


def transformers() -> str:
    rows = read_rows(RESULTS / "hf.csv", gpu=GPU)
    return table(
        "model | tokens | density | sdpa ms | flashprefill ms | times",
        [
            [model, length(row), density(row["density"]), *times(row, "sdpa_ms")]
            for model in dict.fromkeys(row["model"] for row in rows)
            for row in newest([row for row in rows if row["model"] == model], "tokens")
        ],
    )


def times(row: Row, other: str, between: str | None = None) -> list[str]:
    """Milliseconds without and with FlashPrefill, those of a third column, and how many times faster it is."""
    faster = float(row[other]) / float(row["flash_ms"])
    third = [] if between is None else [milliseconds(row[between])]
    return [milliseconds(row[other]), milliseconds(row["flash_ms"]), *third, f"{faster:.2f}"]


def ttft(vllm: str, model: str) -> Callable[[], str]:
    def write() -> str:
        chunks = ttft_rows(RESULTS / "vllm.csv", GPU, vllm, model)
        header = "tokens | density | default | FlashPrefill | bound | times"
        lines = [[length(row), density(row["density"]), *times(row, "default_ms", "bound_ms")] for row in chunks.pop(0)]
        for chunk, rows in chunks.items():
            header += f" | in chunks of {length_name(chunk)}: default | FlashPrefill | times"
            found = {length(row): times(row, "default_ms") for row in rows}
            lines = [line + found.get(line[0], ["", "", ""]) for line in lines]
        return table(header, lines)

    return write


def ttft_versions() -> str:
    """One prompt at once, the lengths that all versions have; in brackets the bound."""
    models = {"0.24.0": "llama-8b, 32 layers"} | dict.fromkeys(("0.12.0", "0.10.0"), "llama-8b, 8 layers, eager")
    found = [
        {row["tokens"]: times(row, "default_ms", "bound_ms") for row in ttft_rows(RESULTS / "vllm.csv", GPU, *pair)[0]}
        for pair in models.items()
    ]
    lines = []
    for tokens in [tokens for tokens in found[0] if all(tokens in version for version in found)]:
        lines.append([length_name(int(tokens))])
        for default, flash, bound, faster in (version[tokens] for version in found):
            lines[-1] += [default, f"{flash} ({bound})" if bound else flash, faster]
    return table(" | ".join(["prompt tokens", *(f"{v}: default | FlashPrefill | times" for v in models)]), lines)


# vLLM and model of the first figures that a reader sees.
CLAIMED = ("0.24.0", "llama-8b, 32 layers")


def claim() -> str:
    """What a reader is told first: how much sooner the longest prompt, one of 32K and the longest append answer."""
    rows = ttft_rows(RESULTS / "vllm.csv", GPU, *CLAIMED)[0]
    longest, shorter = rows[-1], next(row for row in rows if length(row) == "32K")
    at_longest, at_shorter = (times(row, "default_ms")[2] for row in (longest, shorter))
    append = append_rows(RESULTS / "vllm.csv")[-1]
    cached = f"{int(append['cached']) // 1024}K"
    return (
        f"**vLLM {longest['vllm']} on an {longest['gpu']} gives the first token of {length(longest)} tokens "
        f"{at_longest} times as fast, of {length(shorter)} {at_shorter} times.**\n"
        "Measured: one request, Llama-3.1-8B's shape, random weights, the paper's score and densities "
        f"({density(longest['density'])} and {density(shorter['density'])}).\n"
        f"With the default score, on an {append['gpu']}, {int(append['tokens']):,} tokens over {cached} cached ones "
        f"come {float(append['speedup']):.2f} times as fast, at {density(append['density'])}, imposed.\n"
    )


def accuracy() -> str:
    """For each model, length and commit: a line for each task and number of prompts, a column for each setting."""
    path = RESULTS / "accuracy.csv"
    runs = by_run(read_rows(path) if path.exists() else [])
    models = list(dict.fromkeys(model for model, *_ in runs))
    # Of one model and length the newest first.
    order = sorted(reversed(runs), key=lambda run: (models.index(run[0]), int(run[1])))
    return "\n".join(accuracy_table(runs[run]) for run in order)


RUN = ("model", "tokens", "vllm", "gpu", "commit")


def by_run(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in RUN), []).append(row)
    return runs


# Commits whose pieces were scored by the sum over rows.
SUMMED = ("3aa2fa8", "f9f9af6", "b15c57b")


def setting_words(setting: str, commit: str) -> str:
    """A setting's name beside those of other commits; 270fd20 asked for the score that is the only one since."""
    return f"sum over rows, {setting}" if commit in SUMMED else setting.replace(", piece_score row", "")


def accuracy_table(rows: list[Row]) -> str:
    # The last of each is the newest. Settings may have had other numbers of prompts.
    newest = {(row["task"], row["n"], row["seed"], row["dense"], row["setting"]): row for row in rows}
    settings = dict.fromkeys(setting for *_, setting in newest)
    lines = sorted(dict.fromkeys(place[:4] for place in newest), key=lambda line: (task_place(line[0]), -int(line[1])))
    model, tokens, vllm, gpu, commit = (rows[-1][name] for name in RUN)
    caption = f"{model}, {int(tokens):,} tokens, vLLM {vllm}, {gpu}, commit {commit}:\n\n"
    return caption + table(
        " | ".join(["task", "n", "seed", "dense", *(setting_words(setting, commit) for setting in settings)]),
        [
            [*line[:3], score(line[0], line[3]), *(change(newest.get((*line, setting))) for setting in settings)]
            for line in lines
        ],
    )


# The mean of the next four comes first; then other tasks, and perplexity.
TASK_ORDER = ("multi-fact", "multi_key", "multi_value", "multi_query", "variable_tracking")


def task_place(task: str) -> tuple[int, str]:
    if task in TASK_ORDER:
        return TASK_ORDER.index(task), ""
    return len(TASK_ORDER) + (task == "perplexity"), task


def score(task: str, value: str) -> str:
    return f"{float(value):.{3 if task == 'perplexity' else 1}f}"


def change(row: Row | None) -> str:
    """A setting's score, its change with the interval, and its density."""
    if row is None:
        return ""
    digits, unit = (2, " %") if row["task"] == "perplexity" else (1, "")
    kept = f"{100 * float(row['density']):.1f} %" if row["density"] else "dense"
    return f"{score(row['task'], row['sparse'])}: {interval(row, digits, unit)} at {kept}"


def interval(row: Row, digits: int = 1, unit: str = "") -> str:
    """A change with its interval."""
    moved, low, high = (f"{float(row[name]):+.{digits}f}" for name in ("change", "low", "high"))
    return f"{moved}{unit} ({low} to {high})"


ESTIMATES = {
    "exact": "every key",
    "p": "mean keys of {} neighbours",
    "km": "means of {} clusters",
    "out": "{} outliers, mean of the others",
    "var": "mean and variance",
    "published": "published score",
}
RULES = {
    "pub": "",
    "row": ", by each row's best",
    "most": ", largest share of a row",
    "share": ", share of each row",
    "head": ", by head",
}


def estimate_runs() -> dict[tuple[str, ...], dict[tuple[str, ...], dict[str, Row]]]:
    """Of each run of results/estimates.csv the rows of each rule by task, the newest of each."""
    found: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, Row]]] = {}
    for run, rows in by_run(read_rows(RESULTS / "estimates.csv")).items():
        rules = found.setdefault(run, {})
        for row in rows:
            rule = tuple(row[name] for name in ("estimate", "rows", "rule", "candidates"))
            rules.setdefault(rule, {})[row["task"]] = row
    return found


def estimates() -> str:
    """A table of each of `SHOWN_ESTIMATES`, its rules best first: the mean of the tasks, and each."""
    runs = estimate_runs()
    return "\n".join(estimates_table(run, runs[run]) for run in runs if run[-1] in SHOWN_ESTIMATES)


# Commits of runs, those before had one that is shown instead.
SHOWN_ESTIMATES = ("45975e5", "b15c57b")


def estimates_table(run: tuple[str, ...], rules: dict[tuple[str, ...], dict[str, Row]]) -> str:
    model, tokens, vllm, gpu, commit = run
    best = sorted(rules.values(), key=lambda by_task: -float(by_task["multi-fact"]["change"]))
    tasks = [task for task in best[0] if task != "multi-fact"]
    n = best[0]["multi-fact"]["n"]
    dense = [points(best[0][task]["dense"]) for task in ("multi-fact", *tasks)]
    caption = f"{model}, {int(tokens):,} tokens, {n} prompts, vLLM {vllm}, {gpu}, commit {commit}:\n\n"
    return caption + table(
        " | ".join(["score of", "rows", "candidates", "density", "all tasks", "change (95 %)", *tasks]),
        [["dense", "", "", "", dense[0], "", *dense[1:]], *(estimate_line(by_task, tasks) for by_task in best)],
    )


# What the front page shows of these tables: commit, estimate, rows, rule and candidates, and how it says so.
FIRST_ESTIMATES = {
    ("45975e5", "published", "128", "head", ""): "by one mean key, thresholds by head, in PyTorch, 80 prompts",
}


# What it puts before that, of results/accuracy.csv, and how it says so.
JUDGED_MODEL = "Qwen2.5-Coder-1.5B-Instruct"
JUDGED = {
    "alpha 0.73": "by pieces, each row by its best one: **the default**",
    "alpha 0.73, candidate_alpha 0.003": "the same, `candidate_alpha` 0.003",
    "sum over rows, alpha 0.06": "by pieces, summed over rows, the default before",
}


def estimates_short() -> str:
    """What the kernels' answers are, then a few of `estimates`: all tasks together."""
    found = {(run[-1], *rule): by_task for run, rules in estimate_runs().items() for rule, by_task in rules.items()}
    judged: dict[str, list[Row]] = {}
    for row in read_rows(RESULTS / "accuracy.csv", task="multi-fact", model=JUDGED_MODEL):
        judged.setdefault(setting_words(row["setting"], row["commit"]), []).append(row)
    lines = []
    for setting, name in JUDGED.items():
        row = max(judged[setting], key=lambda row: int(row["n"]))
        kept = f"{100 * float(row['density']):.1f} %"
        lines.append([f"{name}, {row['n']} prompts", kept, points(row["dense"]), points(row["sparse"]), interval(row)])
    for rule, name in FIRST_ESTIMATES.items():
        row = found[rule]["multi-fact"]
        _, _, _, kept, score, changed, *_ = estimate_line(found[rule], [])
        lines.append([name, kept, points(row["dense"]), score, changed])
    return table("a block is scored | density | dense | sparse | change, 95 % interval", lines)


def estimate_line(by_task: dict[str, Row], tasks: Iterable[str]) -> list[str]:
    row = by_task["multi-fact"]
    name, size = re.fullmatch(r"(\D+)(\d*)", row["estimate"]).groups()
    return [
        ESTIMATES[name].format(size) + RULES[row["rule"]],
        row["rows"],
        row["candidates"] or "all",
        f"{100 * float(row['density']):.1f} %",
        points(row["sparse"]),
        interval(row),
        *(points(by_task[task]["sparse"]) for task in tasks),
    ]


def points(value: str) -> str:
    return f"{float(value):.1f}"


def densities() -> str:
    """What the default keeps of each model, text and length that research.density looked at, the newest of each."""
    rows = {(row["model"], row["text"], int(row["tokens"])): row for row in read_rows(RESULTS / "density.csv")}
    return table(
        "model | layers | query/KV heads | text | tokens | density",
        [
            [model, row["layers"], row["heads"], text, f"{tokens:,}", density(row["density"])]
            for (model, text, tokens), row in rows.items()
        ],
    )


def versions() -> str:
    """The newest row of each vLLM and kind of machine, newest release first."""
    path = RESULTS / "versions.csv"
    rows = {(row["vllm"], row["kind"], row["tests"]): row for row in read_rows(path)} if path.exists() else {}

    def release(row: Row) -> list[int]:
        return [int(part) for part in row["vllm"].split(".")]

    return table(
        "vLLM | on | tests | date | passed | failed | skipped",
        [
            [row["vllm"], row["kind"], f"`{row['tests']}`", row["date"], row["passed"], row["failed"], row["skipped"]]
            for row in sorted(rows.values(), key=release, reverse=True)
        ],
    )


def appends() -> str:
    """New tokens over cached ones: the default backend, FlashPrefill, no attention; and how many times as fast."""
    rows = append_rows(RESULTS / "vllm.csv")
    cached = sorted({int(row["cached"]) for row in rows})

    def cell(row: Row) -> str:
        times = " / ".join(milliseconds(row[name]) for name in ("default_ms", "flash_ms", "bound_ms"))
        return f"{times}: **{float(row['speedup']):.2f}**"

    by_tokens = itertools.groupby(rows, key=lambda row: row["tokens"])
    lines = [[f"{int(tokens):,}", *map(cell, found)] for tokens, found in by_tokens]
    return table(" | ".join(["new tokens", *(f"{n // 1024}K cached" for n in cached)]), lines)


TABLES: dict[str, Callable[[], str]] = {
    "appends": appends,
    "versions": versions,
    "densities": densities,
    "kernels-short": kernels_short,
    "kernels": kernels_whole,
    "kernel-shapes": kernel_shapes,
    "kernel-e4m3": kernel_e4m3,
    "transformers": transformers,
    "estimates": estimates,
    "estimates-short": estimates_short,
    "claim": claim,
    "ttft-versions": ttft_versions,
    "ttft-0.24.0": ttft("0.24.0", "llama-8b, 32 layers"),
    "ttft-0.12.0": ttft("0.12.0", "llama-8b, 8 layers, eager"),
    "ttft-0.10.0": ttft("0.10.0", "llama-8b, 8 layers, eager"),
    "ttft-tensor-parallel": ttft("0.24.0", "llama-8b, 32 layers, tensor parallel 2"),
    "ttft-pipeline-parallel": ttft("0.24.0", "llama-8b, 16 layers, pipeline parallel 2, eager"),
    "accuracy": accuracy,
    "ttft-70b": ttft("0.24.0", "llama-70b, 10 layers, tensor parallel 2, eager"),
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """A page's text with each of its tables as its rows have it."""
    return PLACE.sub(lambda place: place[1] + place[2] + TABLES[place[1]](), text)


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if with_tables(text) != text:
            page.write_text(with_tables(text), encoding="utf-8")
            print(f"wrote the tables of {page.relative_to(ROOT)}")
    for name in plot.PLOTS:
        if not plot.is_current(name, ROOT / name):
            try:
                plot.draw(name, ROOT / name)
            except ImportError:
                sys.exit(f"error: {name} is older than its rows; drawing needs matplotlib: pip install matplotlib")
            print(f"drew {name}")


if __name__ == "__main__":
    main()
