"""Records of published data sets, from JSONL files that a user has.

RULER's files hold whole prompts. The others hold a text and a question; they are put together in words of our own, so
scores tell dense from sparse and are not those of a leaderboard.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Record:
    """One question of a data set.

    Attributes:
        prompt: what the model reads. answer_prefix: how its answer starts.
        cut: whether a prompt that is too long loses its middle, as the data set's authors have it; else it is left out.
        Others as in `tasks.Sample`.
    """

    task: str
    prompt: str
    answer_prefix: str
    expected: list[str]
    metric: str
    max_tokens: int
    cut: bool
    classes: list[str] = dataclasses.field(default_factory=list)


class Unsupported(Exception):
    """This data set's task has no reader or no metric here; the message names it."""


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


# Tokens that RULER gives each kind of answer.
RULER_TOKENS = {"niah": 128, "vt": 30, "variable_tracking": 30, "cwe": 120, "fwe": 50, "qa": 32}
RULER_TOKENS |= {"common_words_extraction": 120, "freq_words_extraction": 50}


def _ruler_tokens(task: str) -> int:
    for name, tokens in RULER_TOKENS.items():
        if task == name or task.startswith(f"{name}_"):
            return tokens
    raise Unsupported(f"RULER's task {task!r}; a file is named after its task, or its folder is")


def ruler(row: dict[str, Any], task: str) -> Record:
    """NVIDIA's generators: index, input, outputs, length; newer ones keep the prompt's end in answer_prefix."""
    metric = "string_match_part" if task.startswith("qa") else "string_match_all"
    prefix = row.get("answer_prefix", "")
    return Record(task, row["input"], prefix, _strings(row["outputs"]), metric, _ruler_tokens(task), cut=False)


def helmet_ruler(row: dict[str, Any], task: str) -> Record:
    """HELMET's RULER: context, query or question, answer or outputs; some type_needle_v, num_v or example."""
    query = row.get("query", row.get("question", ""))
    expected = _strings(row["answer"] if "answer" in row else row["outputs"])
    metric = "string_match_all"
    if task.startswith("niah"):
        what, several = row.get("type_needle_v", "numbers"), len(expected) > 1
        asked = f"What {'are all' if several else 'is'} the special magic {what} for {query} in the text above?"
        prefix = f"The special magic {what} for {query} in the text {'are' if several else 'is'}"
    elif task.startswith("vt"):
        asked = f"Question: Which variables are assigned the value {query} in the text above?"
        prefix = f"Answer: The {row.get('num_v', len(expected))} variables that are assigned the value {query} are:"
    elif task.startswith("cwe"):
        asked, prefix = "Question: What are the 10 most common words in the list above?", "Answer: The 10 words are:"
    elif task.startswith("fwe"):
        asked = "Question: What are the three most frequent words in the coded text above? Ignore the dots."
        prefix = "Answer: The three most frequent words are:"
    elif task.startswith("qa"):
        asked, prefix, metric = f"Question: {query}", "Answer:", "substring_exact_match"
    else:
        raise Unsupported(f"HELMET's RULER task {task!r}; a file is named after its task, or its folder is")
    example = f"{row['example']}\n\n" if row.get("example") else ""
    prompt = f"{example}{row['context']}\n\n{asked}\n"
    return Record(task, prompt, prefix, expected, metric, _ruler_tokens(task), cut=False)


INFINITEBENCH = {
    "passkey": ("first_number", 6),
    "number_string": ("first_number", 12),
    "math_find": ("first_number", 8),
    "kv_retrieval": ("string_match_all", 50),
    "longbook_qa_eng": ("qa_f1", 40),
    "longdialogue_qa_eng": ("string_match_part", 40),
    "longbook_choice_eng": ("choice", 40),
}


def infinitebench(row: dict[str, Any], task: str) -> Record:
    """InfiniteBench: id, context, input, answer, options."""
    if task not in INFINITEBENCH:
        raise Unsupported(f"InfiniteBench's {task!r}; known: {', '.join(INFINITEBENCH)}")
    metric, max_tokens = INFINITEBENCH[task]
    expected = _strings(row["answer"])
    asked = row["input"]
    if metric == "choice":
        options = row["options"]
        asked += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
        expected = [expected[0], "ABCD"[options.index(expected[0])]]
    elif metric == "first_number":
        expected = expected[:1]
    prompt = f"{row['context']}\n\n{asked}\n"
    return Record(task, prompt, "Answer:", expected, metric, max_tokens, cut=True)


LONGBENCH = {
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "triviaqa": ("qa_f1_first_line", 32),
    "trec": ("classification", 64),
    "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32),
}


def longbench(row: dict[str, Any], task: str) -> Record:
    """LongBench and LongBench-E: input, context, answers, length, dataset, language, all_classes, _id."""
    task = row.get("dataset", task).removesuffix("_e")
    if task not in LONGBENCH:
        raise Unsupported(f"LongBench's {task!r}; known: {', '.join(LONGBENCH)}")
    metric, max_tokens = LONGBENCH[task]
    if task == "passage_count":
        asked = "How many different paragraphs are there above, repetitions left out? Answer with the number."
    elif task == "passage_retrieval_en":
        asked = f'Which paragraph above is this a summary of? Answer as in "Paragraph 1".\n\n{row["input"]}'
    elif metric == "classification" or task == "triviaqa":
        asked = row["input"]
    else:
        asked = f"Answer from the text above, as briefly as you can.\n\nQuestion: {row['input']}"
    prefix = "" if metric == "classification" or task == "triviaqa" else "Answer:"
    prompt = f"{row['context']}\n\n{asked}\n".removesuffix("\n" if not prefix else "")
    classes = row.get("all_classes") or []
    return Record(task, prompt, prefix, _strings(row["answers"]), metric, max_tokens, cut=True, classes=classes)


Reader = Callable[[dict[str, Any], str], Record]
READERS: dict[str, Reader] = {
    "ruler": ruler,
    "helmet": helmet_ruler,
    "infinitebench": infinitebench,
    "longbench": longbench,
}


def reader_for(row: dict[str, Any]) -> str:
    """The data set that has records with these fields.

    Raises:
        Unsupported: none has.
    """
    fields = set(row)
    if {"context", "input", "answers"} <= fields:
        return "longbench"
    if {"context", "input", "answer"} <= fields:
        return "infinitebench"
    if "context" in fields and fields & {"answer", "outputs"}:
        return "helmet"
    if {"input", "outputs"} <= fields:
        return "ruler"
    raise Unsupported(f"records with the fields {', '.join(sorted(fields))}")


def task_name(path: Path) -> str:
    """The task of a file: its name, or its folder's where it is called validation, test or validation_8192."""
    name = path.stem
    return path.parent.name if name.split("_")[0] in ("validation", "test", "train") else name


def read(path: Path, limit: int) -> Iterator[Record]:
    """Up to `limit` records of each JSONL file at `path`, a file or a folder.

    Raises:
        Unsupported: a file that none of the readers knows, named by its message.
    """
    files: Iterable[Path] = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    for file in files:
        with file.open(encoding="utf-8") as lines:
            rows = (json.loads(line) for line in lines if line.strip())
            for _, row in zip(range(limit), rows, strict=False):
                try:
                    yield READERS[reader_for(row)](row, task_name(file))
                except Unsupported as error:
                    raise Unsupported(f"{file.name}: there is nothing here for {error}") from None


def cut_middle(tokens: list[int], length: int) -> list[int]:
    """The first and last tokens, `length` together."""
    half = length // 2
    return tokens if len(tokens) <= length else tokens[:half] + tokens[len(tokens) - (length - half) :]
