"""Scores of one answer, each in [0, 1], as the benchmarks define them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def string_match_all(answer: str, expected: Sequence[str]) -> float:
    """RULER: the share of the expected strings that the answer holds."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


def string_match_part(answer: str, expected: Sequence[str]) -> float:
    """RULER's question answering: whether the answer holds any of the expected strings."""
    return float(any(text.lower() in answer.lower() for text in expected))


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case without punctuation, articles and extra space."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def substring_exact_match(answer: str, expected: Sequence[str]) -> float:
    """HELMET's question answering: whether the answer holds an expected string, both in normal form."""
    return float(any(normalise(text) in normalise(answer) for text in expected))


def qa_f1(answer: str, expected: Sequence[str]) -> float:
    """LongBench and InfiniteBench: F1 of the words, for the best of the expected answers."""
    return max(_f1(normalise(answer).split(), normalise(text).split()) for text in expected)


def _f1(answer: list[str], expected: list[str]) -> float:
    same = sum((Counter(answer) & Counter(expected)).values())
    return 2 * same / (len(answer) + len(expected)) if same else 0.0


def qa_f1_first_line(answer: str, expected: Sequence[str]) -> float:
    """LongBench's TriviaQA: `qa_f1` of the answer's first line."""
    return qa_f1(_first_line(answer), expected)


def _first_line(answer: str) -> str:
    return answer.lstrip("\n").split("\n")[0]


def classification(answer: str, expected: Sequence[str], classes: Sequence[str]) -> float:
    """LongBench: 1 / the class names in the answer's first line, where the right one is among them."""
    answer = _first_line(answer)

    def against(right: str) -> float:
        named = [name for name in classes if name in answer]
        # A name that is a part of the right one comes with it.
        named = [name for name in named if name == right or name not in right]
        return 1 / len(named) if right in named else 0.0

    return max(map(against, expected))


PARAGRAPH = re.compile(r"Paragraph (\d+)")


def retrieval(answer: str, expected: Sequence[str]) -> float:
    """LongBench: the share of the answer's numbers that are the expected paragraph's."""
    return count(answer, [PARAGRAPH.findall(text)[0] for text in expected])


def count(answer: str, expected: Sequence[str]) -> float:
    """LongBench: the share of the answer's numbers that are right."""
    numbers = re.findall(r"\d+", answer)
    return max(numbers.count(str(right)) / len(numbers) for right in expected) if numbers else 0.0


def first_number(answer: str, expected: Sequence[str]) -> float:
    """InfiniteBench's passkey, number string and math find: whether the answer's first number is the expected one."""
    if "." in expected[0]:
        found = re.search(r"\d+\.\d+|\d+", answer)
        return float(found is not None and float(found.group()) == float(expected[0]))
    found = re.search(r"\d+", answer)
    return float(found is not None and found.group() == expected[0])


def choice(answer: str, expected: Sequence[str]) -> float:
    """InfiniteBench: whether the answer names the right option, by text or letter; both are expected."""
    answer = answer.strip()
    if answer[:1] and answer[0] in "ABCD":
        return float(answer[0] in expected)
    if answer in expected:
        return 1.0
    words = re.sub(r"[\n\"'.,?!{}]", " ", answer)
    words = re.sub(" +", " ", words)
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        at = words.find(phrase)
        if at >= 0:
            return float(words[at + len(phrase) + 1 :].startswith(tuple(expected)))
    letters = [word for word in words.split() if word in "ABCD"]
    return float(bool(letters) and letters[0] in expected)


METRICS = {
    metric.__name__: metric
    for metric in (
        string_match_all,
        string_match_part,
        substring_exact_match,
        qa_f1,
        qa_f1_first_line,
        classification,
        retrieval,
        count,
        first_number,
        choice,
    )
}


NUMBER = re.compile(r"-?\d+(\.\d+)?")


def unusable(metric: str, expected: Sequence[str], classes: Sequence[str] = ()) -> str | None:
    """Why no answer can be scored against these expected ones, None where it can."""
    if not expected:
        return "no answer is expected"
    # What every answer holds says nothing, nor does an answer that none can equal.
    every = metric.startswith("string_match")
    if (any if every else all)(not text.strip() for text in expected):
        return "an expected answer is empty"
    for text in expected:
        if metric == "retrieval" and not PARAGRAPH.search(text):
            return f'{text!r} has no "Paragraph" with its number'
        if metric == "count" and not text.isdecimal():
            return f"{text!r} is no count"
        if metric == "classification" and text not in classes:
            return f"{text!r} is none of the classes"
    if metric == "first_number" and not NUMBER.fullmatch(expected[0]):
        return f"{expected[0]!r} is no number"
    return None


def score(metric: str, answer: str, expected: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The score of an answer, by the name of its metric."""
    if metric == "classification":
        return classification(answer, expected, classes)
    return METRICS[metric](answer, expected)
