"""From the answers of all settings to scores: rows, sums and tables. The first setting is the dense one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.scoring import score
from evaluation.tasks import Sample

RESAMPLES = 2000
# The tasks that ask for the one fact of a prompt; the second is RULER's.
SINGLE = ("single", "niah_single")


def sample_rows(samples: Sequence[Sample], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a prompt, with the answer of each setting and its score."""
    rows = []
    for place, sample in enumerate(samples):
        row = {
            "task": sample.task,
            "length": sample.length,
            "depth": sample.depth,
            "group": sample.group,
            "prompt_tokens": len(sample.tokens),
            "metric": sample.metric,
            "expected": sample.expected,
            "answers": {},
        }
        for setting in settings:
            answer = setting["samples"][place]
            scored = score(sample.metric, answer["text"], sample.expected, sample.classes)
            row["answers"][setting["name"]] = {"score": round(scored, 4), **answer}
        rows.append(row)
    return rows


def interval(values: Iterable[tuple[Hashable, Hashable, float]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over strata of each stratum's mean.

    Args:
        values: of each item its stratum, its cluster and its value. The clusters of a stratum are drawn anew.
    """
    strata: dict[Hashable, dict[Hashable, list[float]]] = {}
    for stratum, cluster, value in values:
        strata.setdefault(stratum, {}).setdefault(cluster, []).append(value)
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for clusters in strata.values():
        sums = np.array([sum(cluster) for cluster in clusters.values()])
        sizes = np.array([len(cluster) for cluster in clusters.values()])
        drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
        means += sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) / len(strata)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def density(counts: Mapping[str, Any]) -> float | None:
    """Key blocks computed of those visible to sparse queries; None where none was sparse."""
    return counts["kept_blocks"] / counts["visible_blocks"] if counts["visible_blocks"] else None


def _counts(setting: dict[str, Any], of: str, length: int) -> dict[str, Any]:
    return next(counts for counts in setting["counts"] if (counts["of"], counts["length"]) == (of, length))


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in rows[0]["answers"] if name != "dense"]


def length_rows(rows: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each length and sparse setting the mean over tasks, its difference to dense, and how sure that is."""
    found = []
    for length in dict.fromkeys(row["length"] for row in rows):
        here = [row for row in rows if row["length"] == length]
        for setting in settings[1:]:
            name = setting["name"]
            line = {
                "length": length,
                "setting": name,
                "prompts": len(here),
                "density": density(_counts(setting, "samples", length)),
            }
            for part, of in (("all", here), ("single", [row for row in here if row["task"].startswith(SINGLE)])):
                if not of:
                    continue
                scores = {
                    one: [(row["task"], row["group"], row["answers"][one]["score"]) for row in of]
                    for one in ("dense", name)
                }
                changes = [
                    (task, group, s - d)
                    for (task, group, d), (_, _, s) in zip(scores["dense"], scores[name], strict=True)
                ]
                line[part] = {
                    "dense": _mean_of_means(scores["dense"]),
                    "sparse": _mean_of_means(scores[name]),
                    "difference": _mean_of_means(changes),
                    "interval": interval(changes),
                    "lower": sum(change < 0 for _, _, change in changes),
                    "higher": sum(change > 0 for _, _, change in changes),
                }
            found.append(line)
    return found


def _mean_of_means(values: Sequence[tuple[Hashable, Hashable, float]]) -> float:
    strata: dict[Hashable, list[float]] = {}
    for stratum, _, value in values:
        strata.setdefault(stratum, []).append(value)
    return statistics.mean(map(statistics.mean, strata.values()))


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean scores of each task and length, and on how many prompts each setting scored lower or higher than dense."""
    summary = []
    for length, task in dict.fromkeys((row["length"], row["task"]) for row in rows):
        here = [row["answers"] for row in rows if (row["length"], row["task"]) == (length, task)]
        line = {
            "task": task,
            "length": length,
            "metric": next(row["metric"] for row in rows if row["task"] == task),
            "prompts": len(here),
            "dense": round(statistics.mean(row["dense"]["score"] for row in here), 4),
            "sparse": {},
        }
        for name in _names(rows):
            changes = [row[name]["score"] - row["dense"]["score"] for row in here]
            line["sparse"][name] = {
                "score": round(statistics.mean(row[name]["score"] for row in here), 4),
                "lower": sum(change < 0 for change in changes),
                "higher": sum(change > 0 for change in changes),
                "same_text": sum(row["dense"]["text"] == row[name]["text"] for row in here),
            }
        summary.append(line)
    return summary


def prediction_rows(texts: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and agreement for each length and sparse setting: before the dense tail of the prompt, and in it."""
    rows = []
    dense, *others = settings
    for length in dict.fromkeys(text["length"] for text in texts):
        for setting in others:
            here = [
                (number, text, one, other)
                for number, (text, one, other) in enumerate(zip(texts, dense["texts"], setting["texts"], strict=True))
                if text["length"] == length
            ]
            blocks = math.ceil(length / setting["config"]["block_size"]) - setting["config"]["num_dense_tail_blocks"]
            # The token at a position is predicted by the row before it.
            tail = blocks * setting["config"]["block_size"] + 1
            for part, places in (("before the tail", range(tail)), ("dense tail", range(tail, length))):
                pairs = [
                    (number, d, s, dt == st)
                    for number, text, one, other in here
                    for at, (d, s, dt, st) in enumerate(
                        zip(one["logprobs"], other["logprobs"], one["predicted"], other["predicted"], strict=True),
                        text["first"],
                    )
                    if at in places
                ]
                if not pairs:
                    continue
                low, high = interval((0, number, d - s) for number, d, s, _ in pairs)
                rows.append(
                    {
                        "length": length,
                        "part": part,
                        "setting": setting["name"],
                        "texts": len(here),
                        "tokens": len(pairs),
                        "density": density(_counts(setting, "texts", length)),
                        "dense_perplexity": round(math.exp(-statistics.fmean(d for _, d, _, _ in pairs)), 4),
                        "sparse_perplexity": round(math.exp(-statistics.fmean(s for _, _, s, _ in pairs)), 4),
                        "change": math.expm1(statistics.fmean(d - s for _, d, s, _ in pairs)),
                        "interval": (math.expm1(low), math.expm1(high)),
                        "agreement": round(statistics.fmean(same for *_, same in pairs), 4),
                    }
                )
    return rows


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}".replace("%", " %")


def _points(value: dict[str, Any] | None) -> dict[str, str]:
    if value is None:
        return {}
    low, high = value["interval"]
    return {
        "dense": f"{100 * value['dense']:.1f}",
        "FlashPrefill": f"{100 * value['sparse']:.1f}",
        "difference": f"{100 * value['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
    }


def tables(result: dict[str, Any]) -> str:
    """The result for a terminal, which is Markdown too. Scores are in points of 100, intervals are of 95 %."""
    parts = []
    if result["lengths"]:
        parts.append(_table([_length_line(row, "all") for row in result["lengths"]]))
        if any("single" in row for row in result["lengths"]):
            parts.append("Single needles:\n")
            parts.append(_table([_length_line(row, "single") for row in result["lengths"] if "single" in row]))
    if result["summary"]:
        parts.append("In brackets, prompts that scored lower and higher than dense:\n")
        parts.append(_table([_task_line(row) for row in result["summary"]]))
    if result["predictions"]:
        parts.append(
            _table(
                [
                    {
                        "predicted": row["part"],
                        "prompt tokens": f"{row['length']:,}",
                        "setting": row["setting"],
                        "density": percent(row["density"]),
                        "tokens": f"{row['tokens']:,}",
                        "dense perplexity": f"{row['dense_perplexity']:.3f}",
                        "FlashPrefill": f"{row['sparse_perplexity']:.3f}",
                        "change in %": f"{100 * row['change']:+.2f} "
                        f"({100 * row['interval'][0]:+.2f} to {100 * row['interval'][1]:+.2f})",
                        "same next token": percent(row["agreement"]),
                    }
                    for row in result["predictions"]
                ]
            )
        )
    return "\n".join(parts)


def _length_line(row: dict[str, Any], part: str) -> dict[str, str]:
    return {
        "prompt tokens": f"{row['length']:,}",
        "setting": row["setting"],
        "density": percent(row["density"]),
        **_points(row[part]),
        "lower": str(row[part]["lower"]),
        "higher": str(row[part]["higher"]),
    }


def _task_line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "task": row["task"],
        "prompt tokens": f"{row['length']:,}",
        "prompts": str(row["prompts"]),
        "dense": f"{100 * row['dense']:.1f}",
        **{
            name: f"{100 * sparse['score']:.1f} (-{sparse['lower']} +{sparse['higher']})"
            for name, sparse in row["sparse"].items()
        },
        "metric": row["metric"],
    }


def _table(rows: list[dict[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["| " + " | ".join(row[name].ljust(width) for name, width in widths.items()) + " |" for row in rows]
    head = "| " + " | ".join(name.ljust(width) for name, width in widths.items()) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    return "\n".join([head, rule, *lines, ""])
