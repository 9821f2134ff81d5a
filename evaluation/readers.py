"""Records of published data sets, from JSONL files that a user has.

RULER's files hold whole prompts, lm-eval's and kvpress' a prompt in parts. The others hold a text and a question; they
are put together in words of our own, so scores tell dense from sparse and are not those of a leaderboard. Every record
is checked while it is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation import scoring


@dataclasses.dataclass
class Record:
    """One question of a data set.

    Attributes:
        prompt: what the model reads. answer_prefix: how its answer starts.
        cut: whether a prompt that is too long loses its middle, as the data set's authors have it; else it is left out.
        sent: how its own evaluation sends it, of `prompts.SENT`.
        context: with kvpress, what comes before the prompt and is encoded by itself.
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
    sent: str = "text"
    context: str = ""


class Unsupported(Exception):
    """There is no metric here for this task; the message names it."""


class BadData(ValueError):
    """A file or record that cannot be used; the message says which, and why."""


class Row:
    """The fields of a record, checked as they are read."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    @property
    def names(self) -> str:
        return ", ".join(sorted(name if name.isprintable() else repr(name) for name in self.fields))

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise BadData(f"{name}: {_short(value)} is no text")
        return _encodable(name, value)

    def whole_text(self, name: str) -> str:
        if not (text := self.text(name)).strip():
            raise BadData(f"{name}: the text is empty")
        return text

    def strings(self, name: str) -> list[str]:
        """A list of texts or numbers, or one of them."""
        value = self.fields.get(name)
        items = value if isinstance(value, list) else [value]
        if not items:
            raise BadData(f"{name}: the list is empty")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, (str, int, float)):
                raise BadData(f"{name}: {_short(item)} is neither a text nor a number")
        return [_encodable(name, str(item)) for item in items]

    def count(self, name: str) -> int:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadData(f"{name}: {_short(value)} is no number of tokens")
        return value

    def expected(self, name: str, metric: str, classes: list[str] | None = None) -> list[str]:
        """The answers in a field, such as the metric can score."""
        answers = self.strings(name)
        trouble = scoring.unusable(metric, answers, classes or [])
        if trouble is not None:
            raise BadData(f"{name}: {trouble}")
        return answers


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadData(f"{name}: half of a character (a lone surrogate), which no tokenizer takes") from None
    return text


# Tokens that RULER gives each kind of answer.
RULER_TOKENS = {"niah": 128, "vt": 30, "variable_tracking": 30, "cwe": 120, "fwe": 50, "qa": 32}
RULER_TOKENS |= {"common_words_extraction": 120, "freq_words_extraction": 50}


def _ruler_kind(task: str) -> str | None:
    return next((name for name in RULER_TOKENS if task == name or task.startswith(f"{name}_")), None)


def _ruler_metric(task: str) -> str:
    return "string_match_part" if task.startswith("qa") else "string_match_all"


def _ruler_tokens(row: Row, task: str) -> int:
    kind = _ruler_kind(task)
    if kind is None:
        raise BadData(
            f"RULER's task {task!r} is none of {', '.join(RULER_TOKENS)}; a file is named after its task, or its "
            f"folder is. The fields are {row.names}"
        )
    return RULER_TOKENS[kind]


def ruler(row: Row, task: str) -> Record:
    """NVIDIA's generators: index, input, outputs, length; newer ones keep the prompt's end in answer_prefix."""
    max_tokens, metric = _ruler_tokens(row, task), _ruler_metric(task)
    expected = row.expected("outputs", metric)
    return Record(task, row.whole_text("input"), row.text("answer_prefix", ""), expected, metric, max_tokens, cut=False)


def lm_eval(row: Row, task: str) -> Record:
    """lm-eval's RULER: index, input, outputs, length, max_length, gen_prefix; tasks such as ruler_vt."""
    record = ruler(row, task.removeprefix("ruler_"))
    return dataclasses.replace(record, answer_prefix=row.text("gen_prefix"), sent="lm-eval")


def kvpress(row: Row, task: str) -> Record:
    """kvpress' data, RULER's among it: context, question, answer_prefix, answer or answers, task, max_new_tokens."""
    task = row.text("task", task).removesuffix("-e").removesuffix("_e")
    classes = []
    if _ruler_kind(task) is not None:
        metric = _ruler_metric(task)
    elif task in LONGBENCH:
        metric, _ = LONGBENCH[task]
        classes = row.strings("all_classes") if metric == "classification" else []
    elif task in INFINITEBENCH:
        metric, _ = INFINITEBENCH[task]
    else:
        raise Unsupported(f"kvpress' {task!r}")
    field = "answers" if "answers" in row else "answer"
    expected = row.expected(field, metric, classes)
    if metric == "choice":
        # The question ends with the options, and the answer is a letter alone.
        options = dict(re.findall(r"^([A-D])\. (.*)$", row.text("question"), re.MULTILINE))
        if expected[0] not in options:
            raise BadData(f"{field}: {_short(expected[0])} is no letter of the question's options")
        expected = [options[expected[0]], expected[0]]
    return Record(
        task,
        row.text("question"),
        row.text("answer_prefix", ""),
        expected,
        metric,
        row.count("max_new_tokens") if "max_new_tokens" in row else _ruler_tokens(row, task),
        cut=False,
        classes=classes,
        sent="kvpress",
        context=row.whole_text("context"),
    )


def helmet_ruler(row: Row, task: str) -> Record:
    """HELMET's RULER: context, query, or for qa question, answer or outputs; some type_needle_v, num_v or example."""
    if "query" not in row and task.startswith(("niah", "vt")):
        raise BadData(f"query: without it {task!r} is not of HELMET's RULER; the fields are {row.names}")
    query = row.text("query", row.text("question", ""))
    metric = "substring_exact_match" if task.startswith("qa") else "string_match_all"
    max_tokens = _ruler_tokens(row, task)
    expected = row.expected("answer" if "answer" in row else "outputs", metric)
    if task.startswith("niah"):
        what, several = row.text("type_needle_v", "numbers"), len(expected) > 1
        asked = f"What {'are all' if several else 'is'} the special magic {what} for {query} in the text above?"
        prefix = f"The special magic {what} for {query} in the text {'are' if several else 'is'}"
    elif task.startswith("vt"):
        asked = f"Question: Which variables are assigned the value {query} in the text above?"
        count = row.count("num_v") if "num_v" in row else len(expected)
        prefix = f"Answer: The {count} variables that are assigned the value {query} are:"
    elif task.startswith("cwe"):
        asked, prefix = "Question: What are the 10 most common words in the list above?", "Answer: The 10 words are:"
    elif task.startswith("fwe"):
        asked = "Question: What are the three most frequent words in the coded text above? Ignore the dots."
        prefix = "Answer: The three most frequent words are:"
    elif task.startswith("qa"):
        asked, prefix = f"Question: {query}", "Answer:"
    else:
        raise BadData(f"HELMET's RULER has no task {task!r}; the fields are {row.names}")
    example = f"{row.text('example')}\n\n" if row.text("example", "") else ""
    prompt = f"{example}{row.whole_text('context')}\n\n{asked}\n"
    return Record(task, prompt, prefix, expected, metric, max_tokens, cut=False)


INFINITEBENCH = {
    "passkey": ("first_number", 6),
    "number_string": ("first_number", 12),
    "math_find": ("first_number", 8),
    "kv_retrieval": ("string_match_all", 50),
    "longbook_qa_eng": ("qa_f1", 40),
    "longdialogue_qa_eng": ("string_match_part", 40),
    "longbook_choice_eng": ("choice", 40),
}


def infinitebench(row: Row, task: str) -> Record:
    """InfiniteBench: id, context, input, answer, options."""
    if task not in INFINITEBENCH:
        raise Unsupported(f"InfiniteBench's {task!r}")
    metric, max_tokens = INFINITEBENCH[task]
    expected = row.expected("answer", metric)
    asked = row.text("input")
    if metric == "choice":
        options = row.strings("options")
        if expected[0] not in options[:4]:
            raise BadData(f"answer: {_short(expected[0])} is none of the options")
        asked += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
        expected = [expected[0], "ABCD"[options.index(expected[0])]]
    elif metric == "first_number":
        expected = expected[:1]
    prompt = f"{row.whole_text('context')}\n\n{asked}\n"
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


def longbench(row: Row, task: str) -> Record:
    """LongBench and LongBench-E: input, context, answers, length, dataset, language, all_classes, _id."""
    task = row.text("dataset", task).removesuffix("_e")
    if task not in LONGBENCH:
        raise Unsupported(f"LongBench's {task!r}")
    metric, max_tokens = LONGBENCH[task]
    classes = row.strings("all_classes") if metric == "classification" else []
    expected = row.expected("answers", metric, classes)
    question = row.text("input")
    if task == "passage_count":
        asked = "How many different paragraphs are there above, repetitions left out? Answer with the number."
    elif task == "passage_retrieval_en":
        asked = f'Which paragraph above is this a summary of? Answer as in "Paragraph 1".\n\n{question}'
    elif metric == "classification" or task == "triviaqa":
        asked = question
    else:
        asked = f"Answer from the text above, as briefly as you can.\n\nQuestion: {question}"
    prefix = "" if metric == "classification" or task == "triviaqa" else "Answer:"
    prompt = f"{row.whole_text('context')}\n\n{asked}\n".removesuffix("\n" if not prefix else "")
    return Record(task, prompt, prefix, expected, metric, max_tokens, cut=True, classes=classes)


Reader = Callable[[Row, str], Record]


def reader_for(row: Row) -> Reader:
    """The reader of records with these fields.

    Raises:
        BadData: none is for them.
    """
    fields = set(row.fields)
    if {"input", "outputs", "gen_prefix"} <= fields:
        return lm_eval
    if {"context", "question", "answer_prefix"} <= fields and fields & {"answer", "answers"}:
        return kvpress
    if {"context", "input", "answers"} <= fields:
        return longbench
    if {"context", "input", "answer"} <= fields:
        return infinitebench
    if "context" in fields and fields & {"answer", "outputs"}:
        return helmet_ruler
    if {"input", "outputs"} <= fields:
        return ruler
    raise BadData(f"no data set that is known here has records with the fields {row.names}")


def task_name(path: Path) -> str:
    """The task of a file: its name, or its folder's where it is called validation, test or validation_8192."""
    name = path.stem
    return path.parent.name if name.split("_")[0] in ("validation", "test", "train") else name


def read(path: Path, limit: int) -> tuple[list[Record], dict[str, list[str]]]:
    """Up to `limit` records of each task in each JSONL file at `path`, a file or a folder.

    Returns:
        the records, and of each task that there is no metric for, whose records are left out, the files.

    Raises:
        BadData: a path, file or record that cannot be used; its message names file, line and field.
    """
    records: list[Record] = []
    without_metric: dict[str, list[str]] = {}
    for file in files_at(path):
        read_of: Counter[str | None] = Counter()
        for number, row in rows(file):
            # What tells the records of several tasks in one file apart.
            task = next((str(row.fields[name]) for name in ("task", "dataset") if name in row), None)
            if read_of[task] == limit:
                if task is None:
                    break
                continue
            read_of[task] += 1
            try:
                records.append(reader_for(row)(row, task_name(file)))
            except Unsupported as error:
                files = without_metric.setdefault(str(error), [])
                if file.name not in files:
                    files.append(file.name)
            except BadData as error:
                raise BadData(f"{file}, line {number}: {error}") from None
    return records, without_metric


def files_at(path: Path) -> list[Path]:
    """The JSONL files of a path, also those that a download has named passkey.jsonl?download=true, or compressed ones.

    Raises:
        BadData: there are none.
    """
    try:
        if not path.is_dir():
            path.stat()
            return [path]
        found = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise BadData(f"{path}: {error.strerror}") from None
    # What is compressed is an error where it is read, not a task that is missing without a word.
    packed = {file: file.with_suffix("") for file in found if file.suffix in COMPRESSED}
    wanted = [file for file in found if packed.get(file) not in found]
    files = [file for file in wanted if packed.get(file, file).suffix.split("?")[0] == ".jsonl"]
    if not files:
        others = ", ".join(sorted({file.suffix for file in found})) or "none at all"
        raise BadData(f"{path}: no .jsonl files in this folder; the files there are: {others}")
    return files


COMPRESSED = (".gz", ".zip", ".bz2", ".xz", ".zst")
# How files begin that are no text.
KINDS = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"PAR1": "a Parquet file; write its rows as JSON, one a line",
    b"ARROW1": "an Arrow file; write its rows as JSON, one a line",
    b"\xff\xfe": "UTF-16 or UTF-32; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself",
    b"[": "a JSON list; write its records one a line",
}


def rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The line numbers and records of a JSONL file.

    Raises:
        BadData: it is not one, or holds no record.
    """
    number, found = 0, False
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                if not found:
                    what = next((what for start, what in KINDS.items() if line.lstrip().startswith(start)), None)
                    if what is not None:
                        raise BadData(f"{file}: this is {what}")
                found = True
                yield number, _row(line)
    except OSError as error:
        raise BadData(f"{file}: {error.strerror}") from None
    except _NoRow as error:
        raise BadData(f"{file}, line {number}: {error}") from None
    if not found:
        raise BadData(f"{file}: no record in this file")


class _NoRow(Exception):
    pass


def _row(line: bytes) -> Row:
    if b"\0" in line:
        raise _NoRow("bytes of 0, as UTF-16 or a damaged file has; save it as UTF-8")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _NoRow(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        where = "cut off, or " if not line.endswith(b"\n") else ""
        raise _NoRow(f"{where}not JSON of one line ({error})") from None
    if not isinstance(row, dict):
        raise _NoRow(f"{_short(row)} is no JSON object")
    return Row(row)


def cut_middle(tokens: list[int], length: int) -> list[int]:
    """The first and last tokens, `length` together."""
    half = length // 2
    return tokens if len(tokens) <= length else tokens[:half] + tokens[len(tokens) - (length - half) :]
