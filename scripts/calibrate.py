"""What options cost a model: facts planted in long real texts, asked for after a dense and after a sparse prefill.

Runs the model in transformers, without vLLM, on this package's selection and CPU attention. Each text has facts at
several depths and is prefilled once per setting. The margin of an answer is by how much the logit of its least
certain right token exceeds the best other one: a fact is found where it is above 0. What a setting costs is the change
of the margins against dense attention; their root mean square says more, on a few facts, than how many flip.

    python scripts/calibrate.py --length 7500 --texts 2 '{"alpha": 0.05}' '{"alpha": 0.01, "num_dense_layers": 2}'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from vllm_flashprefill.backend.cpu_attention import sparse_attention_cpu
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.reference import select_blocks_ref

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

# Neither the facts and depths nor the stretches of text of tests/engine and generate.py.
NAMES = ("old lighthouse", "copper bridge", "winter garden", "eastern tower", "marble fountain")
NAMES += ("quiet valley", "amber workshop", "iron gate", "paper museum", "green ferry")
CODES = ("5128", "8640", "2937", "6482", "1759", "3204", "9416", "7063", "4581", "8372")
DEPTHS = (0.05, 0.2, 0.4, 0.6, 0.8)
FIRST_TOKEN, TOKENS_BETWEEN_TEXTS = 20_000, 11_000


@dataclasses.dataclass
class Attention:
    """An attention function for transformers; dense where there is no config, and for steps under a block."""

    config: FlashPrefillConfig | None = None
    prompt_len: int = 0
    kept_blocks: int = 0
    visible_blocks: int = 0

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        num_tokens, seq_len = query.shape[2], key.shape[2]
        config = self.config
        if config is None or num_tokens < config.block_size or module.layer_idx < config.num_dense_layers:
            seen = torch.ones(num_tokens, seq_len, dtype=torch.bool).tril(seq_len - num_tokens)
            mask = {"is_causal": True} if num_tokens == seq_len else {"attn_mask": seen}
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, scale=scaling, enable_gqa=True, **mask
            )
            return out.transpose(1, 2).contiguous(), None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        context_len = seq_len - num_tokens
        mask = select_blocks_ref(
            q, k, context_len=context_len, prompt_len=self.prompt_len, config=config, softmax_scale=scaling
        )
        self.kept_blocks += int(mask.sum())
        self.visible_blocks += mask.shape[0] * mask.shape[1] * (mask.shape[1] + 1) // 2
        out = sparse_attention_cpu(
            q, k, v, mask, context_len=context_len, block_size=config.block_size, softmax_scale=scaling
        )
        return out[None], None


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

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = Attention()
    ALL_ATTENTION_FUNCTIONS["flashprefill"] = attention
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.set_attn_implementation("flashprefill")
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    topics = pydoc_data.topics.topics
    filler = encode("\n\n".join(topics[name] for name in sorted(topics)))
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for index in options.texts:
        text, questions = make_text(encode, filler, index, options.length)
        dense: list[float] = []
        for name, config in {"dense": None, **settings}.items():
            attention.config, attention.prompt_len = config, options.length
            attention.kept_blocks = attention.visible_blocks = 0
            found = margins(model, text, questions)
            dense = dense or found
            changes.setdefault(name, []).extend(zip(dense, found, strict=True))
            density = attention.kept_blocks / attention.visible_blocks if config else 1
            print(f"text {index}  {name}  density {density:.1%}  margins", *(f"{m:+.2f}" for m in found), flush=True)

    for name in settings:
        pairs = changes[name]
        lost = sum(d > 0 >= s for d, s in pairs)
        change = torch.tensor([s - d for d, s in pairs]).square().mean().sqrt()
        print(f"{name}: {lost} of {sum(d > 0 for d, _ in pairs)} lost, root mean square of the change {change:.2f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
