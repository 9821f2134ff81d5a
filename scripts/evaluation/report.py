"""From the answers of both runs to scores: rows, sums and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from evaluation.scoring import score
from evaluation.tasks import Sample


def sample_rows(samples: Sequence[Sample], dense: Sequence[dict], sparse: Sequence[dict]) -> list[dict[str, Any]]:
    """One row a prompt, with both answers and their scores."""
    rows = []
    for sample, *answers in zip(samples, dense, sparse, strict=True):
        row = {
            "task": sample.task,
            "length": sample.length,
            "depth": sample.depth,
            "prompt_tokens": len(sample.tokens),
            "metric": sample.metric,
            "expected": sample.expected,
        }
        for mode, answer in zip(("dense", "sparse"), answers, strict=True):
            scored = score(sample.metric, answer["text"], sample.expected, sample.classes)
            row[mode] = {"score": round(scored, 4), **answer}
        rows.append(row)
    return rows


def density(answers: Iterable[dict[str, Any]]) -> float | None:
    """Key blocks computed of those visible to sparse queries; None where none was sparse."""
    answers = list(answers)
    visible = sum(answer["visible_blocks"] for answer in answers)
    return sum(answer["kept_blocks"] for answer in answers) / visible if visible else None


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean scores of each task and length, and on how many prompts FlashPrefill scored lower or higher than dense."""
    summary = []
    for length, task in dict.fromkeys((row["length"], row["task"]) for row in rows):
        here = [row for row in rows if (row["length"], row["task"]) == (length, task)]
        changes = [row["sparse"]["score"] - row["dense"]["score"] for row in here]
        summary.append(
            {
                "task": task,
                "length": length,
                "metric": here[0]["metric"],
                "prompts": len(here),
                "dense": round(statistics.mean(row["dense"]["score"] for row in here), 4),
                "sparse": round(statistics.mean(row["sparse"]["score"] for row in here), 4),
                "lower": sum(change < 0 for change in changes),
                "higher": sum(change > 0 for change in changes),
                "same_text": sum(row["dense"]["text"] == row["sparse"]["text"] for row in here),
                "density": density(row["sparse"] for row in here),
            }
        )
    return summary


def prediction_rows(
    texts: Sequence[dict[str, Any]], dense: Sequence[dict], sparse: Sequence[dict], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Perplexity and agreement for each length: before the dense tail of the prompt, and in it."""
    rows = []
    for length in dict.fromkeys(text["length"] for text in texts):
        here = [item for item in zip(texts, dense, sparse, strict=True) if item[0]["length"] == length]
        blocks = math.ceil(length / config["block_size"]) - config["num_dense_tail_blocks"]
        # The token at a position is predicted by the row before it.
        tail = blocks * config["block_size"] + 1
        for part, places in (("before the tail", range(tail)), ("dense tail", range(tail, length))):
            pairs = [
                (d, s, dt == st)
                for text, dense_one, sparse_one in here
                for at, (d, s, dt, st) in enumerate(
                    zip(
                        dense_one["logprobs"],
                        sparse_one["logprobs"],
                        dense_one["predicted"],
                        sparse_one["predicted"],
                        strict=True,
                    ),
                    text["first"],
                )
                if at in places
            ]
            if not pairs:
                continue
            rows.append(
                {
                    "length": length,
                    "part": part,
                    "texts": len(here),
                    "tokens": len(pairs),
                    "dense_perplexity": round(math.exp(-statistics.mean(d for d, _, _ in pairs)), 4),
                    "sparse_perplexity": round(math.exp(-statistics.mean(s for _, s, _ in pairs)), 4),
                    "agreement": round(statistics.mean(same for _, _, same in pairs), 4),
                    "density": density(sparse_one for _, _, sparse_one in here),
                }
            )
    return rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def tables(result: dict[str, Any]) -> str:
    """The result for a terminal, which is Markdown too."""
    scores = [
        {
            "task": row["task"],
            "prompt tokens": f"{row['length']:,}",
            "prompts": str(row["prompts"]),
            "density": percent(row["density"]),
            "dense": f"{row['dense']:.2f}",
            "FlashPrefill": f"{row['sparse']:.2f}",
            "lower": str(row["lower"]),
            "higher": str(row["higher"]),
            "metric": row["metric"],
        }
        for row in result["summary"]
    ]
    predictions = [
        {
            "predicted": row["part"],
            "prompt tokens": f"{row['length']:,}",
            "tokens": str(row["tokens"]),
            "density": percent(row["density"]),
            "dense perplexity": f"{row['dense_perplexity']:.3f}",
            "FlashPrefill": f"{row['sparse_perplexity']:.3f}",
            "same next token": f"{row['agreement']:.1%}",
        }
        for row in result["predictions"]
    ]
    return "\n".join(_table(rows) for rows in (scores, predictions) if rows)


def _table(rows: list[dict[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["| " + " | ".join(row[name].ljust(width) for name, width in widths.items()) + " |" for row in rows]
    head = "| " + " | ".join(name.ljust(width) for name, width in widths.items()) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    return "\n".join([head, rule, *lines, ""])
