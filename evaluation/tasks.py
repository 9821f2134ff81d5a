"""RULER's kinds of tasks, made from local text: prompts of exactly so many tokens, by seed and tokenizer alone.

The facts are written and asked for as a plain text goes on ("The secret code of the X is"), so that models without
instruction tuning can answer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.prompts import turn_around
from evaluation.text import Stream, prose

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

# Other names and codes than those of scripts/generate.py, the tests and scripts/facts.py of commit 45975e5.
ADJECTIVES = "crimson hidden frozen wooden ancient narrow velvet distant broken polished misty golden".split()
NOUNS = (
    "observatory windmill chapel railway greenhouse monastery reservoir theatre aqueduct barn pavilion archive".split()
)
TAKEN_CODES = {7391, 4826, 9053, 6174, 5128, 8640, 2937, 6482, 1759, 3204, 9416, 7063, 4581, 8372}

# Said twice: said once, SmolLM2-135M with dense attention misses too many to tell what pruning costs.
FACT = "\n\nThe {kind} of the {name} is {code}. Remember it: the {kind} of the {name} is {code}.\n\n"
QUESTION = "\n\nQuestion: What is the {kind} of the {name}?\nAnswer: The {kind} of the {name} is"
KINDS = ("secret code", "telephone number", "room number", "postal code", "ticket number")


@dataclasses.dataclass
class Sample:
    """One prompt and how its answer is scored.

    Attributes:
        task: what the results are grouped by.
        length: tokens asked for; the prompt has exactly as many, or a few less for the shorter questions of a group.
        depth: where the fact asked for is, as a fraction of the text; None for several.
        tokens: the prompt.
        expected, metric, classes: for `scoring.score`.
        max_tokens: tokens of the answer.
        group: prompts of the same group come one after the other and share what the engine has cached.
    """

    task: str
    length: int
    depth: float | None
    tokens: list[int]
    expected: list[str]
    metric: str
    max_tokens: int
    group: str
    classes: list[str] = dataclasses.field(default_factory=list)


def bos_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("x")[:1] == [bos] else []


def chat_turn(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of the model's chat template before what a user says, and from there to the answer.

    Raises:
        ValueError: the tokenizer has no template.
    """
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in turn_around(tokenizer))
    return before, after


class Maker:
    """What every task needs: a tokenizer and a long text.

    Args:
        chat: a prompt is what a user says in the model's chat template, and the answer's start is the assistant's.
    """

    def __init__(self, tokenizer: Any, text: str | None = None, chat: bool = False) -> None:
        self.encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)
        # For pieces that come again and again.
        self.piece = functools.cache(self.encode)
        text = prose() if text is None else text
        self.stream = Stream(self.encode, text)
        self.words = sorted({word for word in re.findall(r"\b[a-z]{4,9}\b", text)})
        self.bos = bos_tokens(tokenizer)
        # How each prompt begins, and what stands between the question and the answer.
        self.head, self.turn = chat_turn(tokenizer) if chat else (self.bos, [])

    def end(self, question: str) -> list[int]:
        """The tokens of a question and of how its answer starts."""
        if not self.turn:
            return self.encode(question)
        asked, answer = question.rsplit("\nAnswer: ", 1)
        return self.encode(asked) + self.turn + self.encode(answer)

    def facts(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        names = rng.sample(list(itertools.product(ADJECTIVES, NOUNS)), count)
        codes = rng.sample([code for code in range(1000, 10_000) if code not in TAKEN_CODES], count)
        return [(" ".join(name), str(code)) for name, code in zip(names, codes, strict=True)]

    def plant(
        self, rng: random.Random, length: int, planted: Sequence[tuple[float, str]], question: str, room_for: int = 0
    ) -> list[int]:
        """A prompt of `length` tokens: text with each sentence at its depth, then the question.

        Args:
            room_for: tokens to leave for the question, where it is longer than this one.

        Raises:
            ValueError: the prompt is too short for what it must hold.
        """
        pieces = [(depth, self.encode(sentence)) for depth, sentence in sorted(planted)]
        end = self.end(question)
        room = length - len(self.head) - sum(len(piece) for _, piece in pieces) - max(len(end), room_for)
        if room < 0:
            raise ValueError(f"a prompt needs at least {length - room} tokens, not {length}")
        filler = self.stream.take(rng.randrange(len(self.stream.tokens)), room)
        tokens, done = list(self.head), 0
        for depth, piece in pieces:
            at = int(depth * room)
            tokens += filler[done:at] + piece
            done = at
        return tokens + filler[done:] + end

    def answer_tokens(self, expected: Sequence[str]) -> int:
        """Tokens enough for the expected strings; of several, each in a sentence."""
        return sum(len(self.encode(f" {text},")) for text in expected) + 4 + 12 * (len(expected) - 1)


def fact(kind: str, name: str, code: str) -> str:
    return FACT.format(kind=kind, name=name, code=code)


def single(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """One fact."""
    return multi_key(maker, rng, length, depth, keys=1)


def multi_key(maker: Maker, rng: random.Random, length: int, depth: float, keys: int = 4) -> list[dict[str, Any]]:
    """Several facts of one kind, one of them asked for."""
    facts = maker.facts(rng, keys)
    depths = [depth, *rng.sample([other for other in DEPTHS if other != depth], keys - 1)]
    planted = [(at, fact(KINDS[0], *said)) for at, said in zip(depths, facts, strict=True)]
    name, code = facts[0]
    tokens = maker.plant(rng, length, planted, QUESTION.format(kind=KINDS[0], name=name))
    return [{"tokens": tokens, "depth": depth, "expected": [code]}]


def shared_prefix(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """A fact of another kind at each depth, and a question about each, over one text that is cached after the first."""
    facts = maker.facts(rng, len(DEPTHS))
    kinds = rng.sample(KINDS, len(DEPTHS))
    planted = [(at, fact(kind, *said)) for at, kind, said in zip(DEPTHS, kinds, facts, strict=True)]
    questions = [QUESTION.format(kind=kind, name=name) for kind, (name, _) in zip(kinds, facts, strict=True)]
    longest = max(len(maker.end(question)) for question in questions)
    state = rng.getstate()
    samples = []
    for at, question, (_, code) in zip(DEPTHS, questions, facts, strict=True):
        rng.setstate(state)
        tokens = maker.plant(rng, length, planted, question, longest)
        samples.append({"tokens": tokens, "depth": at, "expected": [code]})
    return samples


def multi_value(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """Three codes of one name."""
    (name, _), *_ = facts = maker.facts(rng, 3)
    codes = [code for _, code in facts]
    planted = [
        (at, f"\n\nOne of the secret codes of the {name} is {code}.\n\n")
        for at, code in zip(sorted(rng.sample(DEPTHS, 3)), codes, strict=True)
    ]
    question = (
        f"\n\nQuestion: What are the three secret codes of the {name}?\nAnswer: The secret codes of the {name} are"
    )
    return [{"tokens": maker.plant(rng, length, planted, question), "expected": codes}]


def multi_query(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """Three facts of one kind, all asked for."""
    facts = maker.facts(rng, 3)
    depths = sorted(rng.sample(DEPTHS, 3))
    planted = [(at, fact(KINDS[0], *said)) for at, said in zip(depths, facts, strict=True)]
    names = "the {}, the {} and the {}".format(*(name for name, _ in facts))
    question = f"\n\nQuestion: What are the secret codes of {names}?\nAnswer: The secret codes of {names} are"
    return [{"tokens": maker.plant(rng, length, planted, question), "expected": [code for _, code in facts]}]


def variable_tracking(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """A chain of assignments through the text, and which variables end up with its value; with a short example."""

    def chain() -> tuple[str, list[str], list[str]]:
        value = str(rng.randrange(10_000, 100_000))
        names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(3)]
        lines = [f"VAR {names[0]} = {value}", f"VAR {names[1]} = VAR {names[0]}", f"VAR {names[2]} = VAR {names[1]}"]
        return value, names, lines

    asked = "\n\nQuestion: Which three variables are assigned the value {}?\nAnswer: The variables are VAR"
    value, names, lines = chain()
    example = "\n\n" + "\n".join(lines) + asked.format(value) + f" {names[0]}, VAR {names[1]}, VAR {names[2]}.\n\n"
    value, names, lines = chain()
    depths = sorted(rng.sample(DEPTHS, 3))
    planted = [(0.0, example)] + [(at, f"\n\n{line}\n\n") for at, line in zip(depths, lines, strict=True)]
    tokens = maker.plant(rng, length, planted, asked.format(value))
    return [{"tokens": tokens, "expected": names}]


def common_words(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """A numbered list in which five words make up a third, and the others come once or a few times."""
    words = rng.sample(maker.words, len(maker.words))
    common, others = words[:5], words[5:]
    question = "\n\nQuestion: Which five words come most often in the list above?\nAnswer: The five words are"

    order = rng.random()

    def pieces(total: int) -> list[str]:
        frequent = common * (total // 15)
        rest = (others * (total // len(others) + 1))[: total - len(frequent)]
        listed = frequent + rest
        random.Random(f"{order}/{total}").shuffle(listed)
        return [piece for number, word in enumerate(listed, 1) for piece in (f"\n{number}.", f" {word}")]

    return [_fill(maker, length, pieces, question, common)]


def frequent_words(maker: Maker, rng: random.Random, length: int, depth: float) -> list[dict[str, Any]]:
    """Made-up words whose counts fall by Zipf's law, and the three that come most often."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = list(dict.fromkeys("".join(rng.choices(letters, k=6)) for _ in range(400)))
    weights = [1 / rank**2 for rank in range(1, len(words) + 1)]
    question = "\n\nQuestion: Which three words come most often in the text above?\nAnswer: The three words are"

    order = rng.random()

    def pieces(total: int) -> list[str]:
        share = total / sum(weights)
        listed = [word for word, weight in zip(words, weights, strict=True) for _ in range(int(weight * share))]
        listed += words[-(total - len(listed)) :] if total > len(listed) else []
        random.Random(f"{order}/{total}").shuffle(listed)
        return [piece for word in listed for piece in (" ...", f" {word}")]

    return [_fill(maker, length, pieces, question, words[:3])]


def _fill(
    maker: Maker, length: int, pieces: Callable[[int], list[str]], question: str, expected: list[str]
) -> dict[str, Any]:
    """Line ends, then as many entries as fit, each encoded piece by piece, then the question."""
    end = maker.end(question)
    newline = maker.encode("\n")[-1:]
    room = length - len(maker.head) - len(end)

    def tokens(total: int) -> int:
        return sum(len(maker.piece(piece)) for piece in pieces(total))

    low, high = 15, max(15, room)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle - 1)
    body = [token for piece in pieces(low) for token in maker.piece(piece)]
    if len(body) > room:
        raise ValueError(f"a prompt needs at least {length + len(body) - room} tokens, not {length}")
    return {"tokens": maker.head + newline * (room - len(body)) + body + end, "expected": list(expected)}


TASKS = {
    task.__name__: task
    for task in (
        single,
        multi_key,
        shared_prefix,
        multi_value,
        multi_query,
        variable_tracking,
        common_words,
        frequent_words,
    )
}


def make_samples(
    maker: Maker, tasks: Sequence[str], lengths: Sequence[int], counts: Sequence[int], seed: int
) -> list[Sample]:
    """`counts[i]` prompts of each task at `lengths[i]`; one more prompt of a task leaves the others as they are."""
    samples = []
    for length, count in zip(lengths, counts, strict=True):
        for task, index in itertools.product(tasks, range(count)):
            group = f"{task}/{length}/{index}"
            rng = random.Random(f"{seed}/{group}")
            # Few prompts of each task still cover all depths together.
            depth = DEPTHS[(index + list(TASKS).index(task) + length) % len(DEPTHS)]
            for made in TASKS[task](maker, rng, length, depth):
                made = {"depth": None, "metric": "string_match_all", **made}
                made.setdefault("max_tokens", maker.answer_tokens(made["expected"]))
                samples.append(Sample(task=task, length=length, group=group, **made))
    return samples
