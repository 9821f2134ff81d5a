"""What options cost a model: facts planted in long real texts, asked for after a dense and after a sparse prefill.

Runs the model in transformers, without vLLM, on this package's selection and CPU attention. Each text has facts at
several depths and is prefilled once per setting. The margin of an answer is by how much the logit of its least
certain right token exceeds the best other one: a fact is found where it is above 0. What a setting costs is the change
of the margins against dense attention; their root mean square says more, on a few facts, than how many flip.

    python scripts/facts.py --length 7500 --texts 2 '{"alpha": 0.05}' '{"alpha": 0.01, "num_dense_layers": 2}'
"""

from __future__ import annotations

import argparse
import json

import torch
from generate import MODEL, documentation
from real_model import Attention, load_model

from vllm_flashprefill.config import FlashPrefillConfig

# Neither the facts and depths nor the stretches of text of tests/engine and generate.py.
NAMES = ("old lighthouse", "copper bridge", "winter garden", "eastern tower", "marble fountain")
NAMES += ("quiet valley", "amber workshop", "iron gate", "paper museum", "green ferry")
CODES = ("5128", "8640", "2937", "6482", "1759", "3204", "9416", "7063", "4581", "8372")
DEPTHS = (0.05, 0.2, 0.4, 0.6, 0.8)
FIRST_TOKEN, TOKENS_BETWEEN_TEXTS = 20_000, 11_000


# Tokens of a question and of its answer.
Question = tuple[list[int], list[int]]


def make_text(encode, filler: list[int], index: int, length: int) -> tuple[list[int], list[Question]]:
    """The tokens of a text with a fact at each depth, and the question about each."""
    picked = range(5 * index, 5 * index + len(DEPTHS))
    facts = [(NAMES[i % len(NAMES)], CODES[(i + 3 * (index // 2)) % len(CODES)]) for i in picked]
    sentence = "The secret code of the {0} is {1}. Remember it: the secret code of the {0} is {1}."
    planted = [encode(f"\n\n{sentence.format(*fact)}\n\n") for fact in facts]
    asked = "\n\nQuestion: What is the secret code of the {0}?\nAnswer: The secret code of the {0} is"
    questions = [(encode(asked.format(name)), encode(f" {code}")) for name, code in facts]
    room = length - sum(map(len, planted)) - max(len(question) for question, _ in questions)
    start = FIRST_TOKEN + TOKENS_BETWEEN_TEXTS * index
    text, done = [], 0
    for depth, fact in zip(DEPTHS, planted, strict=True):
        at = int(depth * room)
        text += filler[start + done : start + at] + fact
        done = at
    return text + filler[start + done : start + room], questions


def margins(model, text: list[int], questions: list[Question]) -> list[float]:
    """The margin of each answer after one prefill of the text."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model(torch.tensor([text]), past_key_values=cache, logits_to_keep=1)
    found = []
    for question, answer in questions:
        logits = model(torch.tensor([question + answer]), past_key_values=cache, logits_to_keep=len(answer) + 1)
        logits = logits.logits[0, :-1].float()
        cache.crop(len(text))
        right = logits[range(len(answer)), answer].clone()
        logits[range(len(answer)), answer] = -torch.inf
        found.append(float((right - logits.amax(dim=-1)).min()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="+", help="options as JSON objects")
    parser.add_argument("--model", default=str(MODEL), help="model folder (default: %(default)s)")
    parser.add_argument("--length", type=int, default=7500, help="tokens of text and question (default: %(default)s)")
    parser.add_argument("--texts", type=int, nargs="+", default=[0, 1, 2], help="which texts, 0 to 7")
    options = parser.parse_args()
    settings = {text: FlashPrefillConfig(**json.loads(text)) for text in options.settings}

    attention = Attention(prompt_len=options.length)
    model, tokenizer = load_model(options.model, attention)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    filler = encode(documentation())
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for index in options.texts:
        text, questions = make_text(encode, filler, index, options.length)
        dense: list[float] = []
        for name, config in {"dense": None, **settings}.items():
            attention.use(config)
            found = margins(model, text, questions)
            dense = dense or found
            changes.setdefault(name, []).extend(zip(dense, found, strict=True))
            print(
                f"text {index}  {name}  density {attention.density:.1%}  margins",
                *(f"{m:+.2f}" for m in found),
                flush=True,
            )

    for name in settings:
        pairs = changes[name]
        lost = sum(d > 0 >= s for d, s in pairs)
        change = torch.tensor([s - d for d, s in pairs]).square().mean().sqrt()
        print(f"{name}: {lost} of {sum(d > 0 for d, _ in pairs)} lost, root mean square of the change {change:.2f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
