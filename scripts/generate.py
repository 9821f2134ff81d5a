"""Offline batch generation with FlashPrefill on, and the same prompts dense beside it.

Each prompt is real text (the Python documentation that every Python carries) with one fact planted in it and a
question about that fact at the end. The table shows what was pruned, how long it took and whether the answer is right.
With matplotlib a picture of the blocks that were kept is left behind.

    python scripts/generate.py                                    SmolLM2-135M on vLLM's CPU engine
    python scripts/generate.py --model PATH --lengths 8000,32000  another model
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Run as a file, Python looks for modules beside it alone.
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 8
PICTURE = "kept-blocks.png"
# Of longer prompts a forward takes long on a CPU, and blocks are too small to see.
LONGEST_DRAWN = 8192

FACTS = [
    ("blue harbour", "7391"),
    ("northern library", "4826"),
    ("glass orchard", "9053"),
    ("silver canyon", "6174"),
]


@dataclasses.dataclass
class Prompt:
    tokens: list[int]
    depth: float
    expected: str


@dataclasses.dataclass
class Answer:
    text: str
    seconds: float


def documentation() -> str:
    """The documentation that every Python carries, some half a million characters."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def make_prompts(tokenizer, lengths: list[int]) -> list[Prompt]:
    """Prompts of exactly these lengths in tokens, each with another fact at another depth."""
    text = documentation()
    while len(text) < 8 * sum(lengths):
        text += text
    # No tokenizer packs this text into fewer than one token per 8 characters on average.
    filler = tokenizer.encode(text[: 8 * sum(lengths)], add_special_tokens=False)
    prompts = []
    for index, length in enumerate(lengths):
        name, code = FACTS[index % len(FACTS)]
        depth = (0.15, 0.5, 0.35, 0.75)[index % 4]
        fact = tokenizer.encode(f"\n\nThe secret code of the {name} is {code}.\n\n", add_special_tokens=False)
        question = tokenizer.encode(
            f"\n\nQuestion: What is the secret code of the {name}?\nAnswer: The secret code of the {name} is",
            add_special_tokens=False,
        )
        room = length - len(fact) - len(question)
        if room < 0:
            sys.exit(f"error: a prompt needs at least {length - room} tokens, not {length}")
        start = sum(lengths[:index])
        body = filler[start : start + room]
        at = int(depth * room)
        prompts.append(Prompt(body[:at] + fact + body[at:] + question, depth, code))
    return prompts


def generate(llm, prompts: list[Prompt], label: str, after_each=lambda: None) -> list[Answer]:
    """Answer the prompts one at a time, so that each has its own seconds; a line for each says how long it may take."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    llm.generate([{"prompt_token_ids": prompts[0].tokens[:32]}], params, use_tqdm=False)  # warm-up
    after_each()
    answers: list[Answer] = []
    for number, prompt in enumerate(prompts, 1):
        print(f"{label}, prompt {number} of {len(prompts)}: {estimate(prompts, answers)} ... ", end="", flush=True)
        started = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt.tokens}], params, use_tqdm=False)[0].outputs[0]
        answers.append(Answer(output.text.strip().split("\n")[0], time.perf_counter() - started))
        after_each()
        print(f"{answers[-1].seconds:.1f} s", flush=True)
    return answers


def estimate(prompts: list[Prompt], answers: list[Answer]) -> str:
    """What the next prompt is, and how long it and all that are left may take at the last one's seconds a token."""
    done = len(answers)
    tokens = [len(prompt.tokens) for prompt in prompts]
    said = f"{tokens[done]:,} tokens"
    if not done:
        return said
    pace = answers[-1].seconds / tokens[done - 1]
    said += f", about {pace * tokens[done]:.0f} s"
    if done + 1 < len(tokens):
        said += f" of {pace * sum(tokens[done:]):.0f} s that are left"
    return said


def start_engine(options, max_model_len: int):
    from vllm import LLM

    return LLM(
        options.model,
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_model_len,
        enable_prefix_caching=False,
        seed=0,
        dtype=options.dtype,
    )


def quick_dtype() -> str:
    """The dtype for vLLM's engine where none was asked for."""
    from vllm.platforms import current_platform

    from vllm_flashprefill.device import is_slow_in_bfloat16

    if not (current_platform.is_cpu() and is_slow_in_bfloat16("cpu")):
        return "auto"
    print(
        "In float32: without AVX-512 this CPU is many times slower in bfloat16 (--dtype bfloat16 for it all the same)"
    )
    return "float32"


def dense_answers(options, prompts: list[Prompt], max_model_len: int) -> tuple[list[Answer], bool]:
    """The dense run, and whether its figures are those of an earlier run of the same prompts on this machine."""
    import vllm

    same = json.dumps([vllm.__version__, str(options.model), options.dtype, [prompt.tokens for prompt in prompts]])
    cache = ROOT / "models" / f".dense-{hashlib.sha256(same.encode()).hexdigest()[:16]}.json"
    if cache.exists() and not options.fresh:
        return [Answer(**answer) for answer in json.loads(cache.read_text())], True
    llm = start_engine(options, max_model_len)
    answers = generate(llm, prompts, "dense")
    if cache.parent.is_dir():
        cache.write_text(json.dumps([dataclasses.asdict(answer) for answer in answers]))
    return answers, False


def leave_picture(model: str, sparse: list[Prompt], config, picture: str) -> None:
    """Draw what heads keep of the longest sparse prompt that is not too long, or say why not."""
    from scripts import kept_blocks

    drawn = max((prompt.tokens for prompt in sparse if len(prompt.tokens) <= LONGEST_DRAWN), key=len, default=None)
    if drawn is None:
        print(f"No picture of kept blocks: no prompt up to {LONGEST_DRAWN:,} tokens was sparse.")
    elif not kept_blocks.can_draw():
        print(f"No picture of kept blocks: `{sys.executable} -m pip install matplotlib`, and the next run draws it.")
    else:
        print(f"Drawing the blocks kept of {len(drawn):,} tokens; it takes as long as a prompt ...", flush=True)
        kept = kept_blocks.kept_blocks(model, drawn, config)
        kept_blocks.draw(kept, f"{Path(model).name}, {len(drawn):,} tokens, alpha {config.alpha}", Path(picture))
        print(f"Wrote {picture}: each dark square is a block of keys that a block of queries attended to.")


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        if number == 0:
            print("  ".join("-" * width for width in widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="model folder or name (default: %(default)s)")
    parser.add_argument("--lengths", default="1024,2048,4096,7500", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--alpha", type=float, help="of blocks scored by pieces; default: what the model gets")
    parser.add_argument("--min-sparse-tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--dtype", help="vLLM's; default: auto, or float32 on a CPU that is slow in bfloat16")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense run out")
    parser.add_argument("--picture", help=f"file for the picture (default: {PICTURE} for the default model, else none)")
    parser.add_argument("--fresh", action="store_true", help="run dense again though an earlier run is remembered")
    options = parser.parse_args()
    try:
        lengths = [int(length) for length in options.lengths.split(",")]
    except ValueError:
        parser.error(f"--lengths takes numbers of tokens, not {options.lengths!r}")
    if options.model == str(MODEL) and not MODEL.exists():
        sys.exit("error: the model is not there yet; run `make demo`, or scripts/fetch_model.py first")

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    import vllm_flashprefill

    flash_options = {"min_sparse_tokens": options.min_sparse_tokens}
    if options.alpha is not None:
        flash_options["alpha"] = options.alpha
    print(f"Starting the engine with FlashPrefill: {flash_options}", flush=True)
    vllm_flashprefill.register(**flash_options)

    import vllm
    from transformers import AutoTokenizer

    options.dtype = options.dtype or quick_dtype()
    prompts = make_prompts(AutoTokenizer.from_pretrained(options.model), lengths)
    max_model_len = max(lengths) + ANSWER_TOKENS
    llm = start_engine(options, max_model_len)
    layers = llm.llm_engine.model_config.get_num_layers(llm.llm_engine.vllm_config.parallel_config)
    readings = []
    sparse = generate(llm, prompts, "FlashPrefill", lambda: readings.append(vllm_flashprefill.stats()))
    stats = [after - before for before, after in itertools.pairwise(readings)]
    config = vllm_flashprefill.FlashPrefillConfig.from_vllm(llm.llm_engine.vllm_config)
    del llm
    gc.collect()
    vllm_flashprefill.revert()

    dense, remembered = None, False
    if not options.no_dense:
        dense, remembered = dense_answers(options, prompts, max_model_len)

    header = ["prompt tokens", "fact at", "density", "sparse layers", "dense layers", "seconds", "answer", "right"]
    rows = [header + ["dense seconds", "dense answer", "dense right"] * (dense is not None)]
    for index, (prompt, answer, done) in enumerate(zip(prompts, sparse, stats, strict=True)):
        sparse_layers = round(done.sparse_tokens / len(prompt.tokens))
        row = [
            str(len(prompt.tokens)),
            f"{prompt.depth:.0%}",
            "-" if done.density is None else f"{done.density:.0%}",
            str(sparse_layers),
            str(layers - sparse_layers),
            f"{answer.seconds:.1f}",
            answer.text,
            "yes" if prompt.expected in answer.text else "NO",
        ]
        if dense is not None:
            beside = dense[index]
            right = "yes" if prompt.expected in beside.text else "NO"
            row += [f"{beside.seconds:.1f}", beside.text, right]
        rows.append(row)

    print(f"\n{Path(options.model).name}, vLLM {vllm.__version__}, {vllm.platforms.current_platform.device_name}")
    print_table(rows)
    print("\ndensity: share of the key blocks that sparse layers computed. seconds: prompt and answer together.")
    if remembered:
        print("The dense figures are from an earlier run on this machine; --fresh measures them again.")
    picture = options.picture or (PICTURE if options.model == str(MODEL) else None)
    if picture:
        leave_picture(
            options.model, [p for p, done in zip(prompts, stats, strict=True) if done.density], config, picture
        )
    print("Next: `make test`, or `FLASHPREFILL=1 vllm serve MODEL`; README.md has the options.")


if __name__ == "__main__":
    main()
