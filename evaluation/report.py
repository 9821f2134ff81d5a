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
# The tasks of which several facts belong together, ours and RULER's; their mean is `multi-fact`.
MULTI_FACT = (
    ("multi_key", "niah_multikey"),
    ("multi_value", "niah_multivalue"),
    ("multi_query", "niah_multiquery"),
    ("variable_tracking", "vt"),
)


def sample_rows(samples: Sequence[Sample], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a prompt, with the score of each setting's answer; a setting that has none yet is left out."""
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
            answer = setting.get("samples", {place: None})[place]
            if answer is None:
                continue
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


def density(setting: Mapping[str, Any], of: str, length: int, tasks: Sequence[str]) -> float | None:
    """Key blocks computed of those visible to sparse queries, in these tasks; None where none was sparse."""
    here = [one for one in setting["counts"] if (one["of"], one["length"]) == (of, length) and one["task"] in tasks]
    visible = sum(one["visible_blocks"] for one in here)
    return sum(one["kept_blocks"] for one in here) / visible if visible else None


def groups(tasks: Sequence[str]) -> dict[str, list[str]]:
    """What is averaged: each task alone, those of several facts if every kind is there, and all of them."""
    found = {task: [task] for task in tasks}
    kinds = [[task for task in tasks if task.startswith(names)] for names in MULTI_FACT]
    if all(kinds):
        found["multi-fact"] = [task for kind in kinds for task in kind]
    if len(tasks) > 1:
        found["all"] = list(tasks)
    return found


def change_rows(rows: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each length, group of tasks and sparse setting both means over tasks, in points of 100, and their difference.

    The difference is of the same prompts, low to high its 95 % interval. Groups that a setting has not answered whole
    are left out.
    """
    found = []
    for length in dict.fromkeys(row["length"] for row in rows):
        here = [row for row in rows if row["length"] == length]
        for group, tasks in groups(list(dict.fromkeys(row["task"] for row in here))).items():
            of = [row for row in here if row["task"] in tasks]
            for setting in settings[1:]:
                name = setting["name"]
                if not all({"dense", name} <= row["answers"].keys() for row in of):
                    continue
                pairs = [(row, row["answers"]["dense"], row["answers"][name]) for row in of]
                dense, sparse, changes = (
                    [(row["task"], row["group"], 100 * value(d, s)) for row, d, s in pairs]
                    for value in (
                        lambda d, s: d["score"],
                        lambda d, s: s["score"],
                        lambda d, s: s["score"] - d["score"],
                    )
                )
                low, high = interval(changes)
                found.append(
                    {
                        "tokens": length,
                        "task": group,
                        "setting": name,
                        "density": density(setting, "samples", length, tasks),
                        "n": len(of),
                        "dense": _mean_of_means(dense),
                        "sparse": _mean_of_means(sparse),
                        "change": _mean_of_means(changes),
                        "low": low,
                        "high": high,
                        "lower": sum(change < 0 for *_, change in changes),
                        "higher": sum(change > 0 for *_, change in changes),
                        "same_text": sum(d["text"] == s["text"] for _, d, s in pairs),
                    }
                )
    return found


def pool(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several with other prompts: the settings that all have, without perplexity.

    Raises:
        ValueError: they are of other models, engines or commits, or of the same prompts.
    """
    run = ("model", "vllm", "torch", "device", "dtype", "commit", "batched_tokens")
    first = results[0]
    for name in run:
        if len({result[name] for result in results}) > 1:
            raise ValueError(f"{name} differs: {', '.join(str(result[name]) for result in results)}")
    seeds = [result["seed"] for result in results]
    if any(isinstance(seed, list) for seed in seeds):
        raise ValueError("one of them is pooled already")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the same seed twice has the same prompts: {', '.join(map(str, seeds))}")
    names = [name for name in first["settings"] if all(name in result["settings"] for result in results)]
    for name in names:
        if any(result["settings"][name] != first["settings"][name] for result in results):
            raise ValueError(f"not the same options everywhere: {name}")
    rows = [{**row, "group": f"{result['seed']}/{row['group']}"} for result in results for row in result["samples"]]
    settings = [
        {"name": name, "counts": [count for result in results for count in result["counts"][name]]} for name in names
    ]
    return {
        **{name: first[name] for name in run},
        "complete": all(result["complete"] for result in results),
        "seed": seeds,
        "settings": {name: first["settings"][name] for name in names},
        "changes": change_rows(rows, settings),
        "predictions": [],
        "samples": rows,
    }


def _mean_of_means(values: Sequence[tuple[Hashable, Hashable, float]]) -> float:
    strata: dict[Hashable, list[float]] = {}
    for stratum, _, value in values:
        strata.setdefault(stratum, []).append(value)
    return statistics.mean(map(statistics.mean, strata.values()))


def prediction_rows(texts: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and agreement for each length and sparse setting: before the dense tail of the prompt, and in it."""
    rows = []
    dense, *others = settings
    for length in dict.fromkeys(text["length"] for text in texts):
        for setting in others:
            if not all("texts" in each for each in (dense, setting)):
                continue
            here = [
                (number, text, one, other)
                for number, (text, one, other) in enumerate(zip(texts, dense["texts"], setting["texts"], strict=True))
                if text["length"] == length and None not in (one, other)
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
                        "density": density(setting, "texts", length, ["texts"]),
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


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What results/accuracy.csv holds: scores in points of 100, perplexity before the dense tail, its change in %."""
    run = {name: result[name] for name in ("model", "vllm")} | {"gpu": result["device"], "commit": result["commit"]}
    seeds = result["seed"] if isinstance(result["seed"], list) else [result["seed"]]
    places = dict.fromkeys(("dense", "sparse", "change", "low", "high"), 2)
    rows = [row for row in result["changes"] if row["task"] != "all"]
    for row in result["predictions"]:
        if row["part"] == "before the tail":
            numbers = dict(zip(("change", "low", "high"), (row["change"], *row["interval"]), strict=True))
            rows.append(
                {
                    **row,
                    "tokens": row["length"],
                    "task": "perplexity",
                    "n": row["texts"],
                    "dense": row["dense_perplexity"],
                    "sparse": row["sparse_perplexity"],
                    **{name: 100 * value for name, value in numbers.items()},
                }
            )
    return [
        {
            **run,
            **{name: row[name] for name in ("tokens", "setting")},
            "density": "" if row["density"] is None else round(row["density"], 4),
            **{name: row[name] for name in ("task", "n")},
            **{name: round(row[name], digits + (row["task"] == "perplexity")) for name, digits in places.items()},
            "seed": " ".join(map(str, seeds)),
        }
        for row in rows
    ]


def tables(result: dict[str, Any]) -> str:
    """The result for a terminal, which is Markdown too. Scores are in points of 100, intervals are of 95 %.

    "lower" and "higher" are the prompts that scored so beside dense.
    """
    parts = []
    if result["changes"]:
        parts.append(_table([_change_line(row) for row in result["changes"]]))
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


def _change_line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "prompt tokens": f"{row['tokens']:,}",
        "task": row["task"],
        "prompts": str(row["n"]),
        "setting": row["setting"],
        "density": percent(row["density"]),
        "dense": f"{row['dense']:.1f}",
        "FlashPrefill": f"{row['sparse']:.1f}",
        "change": f"{row['change']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})",
        "lower": str(row["lower"]),
        "higher": str(row["higher"]),
    }


def _table(rows: list[dict[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["| " + " | ".join(row[name].ljust(width) for name, width in widths.items()) + " |" for row in rows]
    head = "| " + " | ".join(name.ljust(width) for name, width in widths.items()) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    return "\n".join([head, rule, *lines, ""])
