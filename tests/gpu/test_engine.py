"""Whole engines on the GPU: FlashPrefill at alpha 0 beside vLLM's default backend, on the same mixed requests."""

import dataclasses
import importlib.util
import itertools
import os
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.support import MODEL, ROOT
from tests.support.jobs import run_job

NUM_REQUESTS = int(os.environ.get("FLASHPREFILL_TEST_REQUESTS", "200"))
LONGEST = 60_000
MAX_TOKENS = 16
ALPHA_0 = {"alpha": 0.0, "min_sparse_tokens": 300, "min_append_tokens": 0}

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="vLLM's FlashAttention reads fp8 caches from Hopper on",
)
needs_model = pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is not there; scripts/fetch_model.py fetches it")


def make_requests():
    """Slices of real text of 1 to 60K tokens, a third of them behind one of a few prefixes that they share."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    generator = np.random.default_rng(0)

    def piece(length):
        start = generator.integers(len(text))
        return (text[start:] + text * (1 + length // len(text)))[:length]

    prefixes = [piece(length) for length in (1000, 2048, 5000, 12_345, 30_000)]
    prompts = [piece(LONGEST), piece(1)]
    while len(prompts) < NUM_REQUESTS:
        length = int(np.exp(generator.uniform(0, np.log(LONGEST))))
        prefix = prefixes[generator.integers(5)] if generator.random() < 0.33 else []
        prompts.append((prefix + piece(length))[:LONGEST])
    return prompts


def measures_free_memory():
    """Whether vLLM sizes its cache by the memory it finds free, as 0.10.0 does, which the engines beside it change."""
    from vllm import EngineArgs

    return "kv_cache_memory_bytes" not in {field.name for field in dataclasses.fields(EngineArgs)}


def run(folder, prompts, chunk, options, cache_dtype="auto"):
    engine = dict(
        model=str(MODEL),
        hf_overrides={"max_position_embeddings": 65_536},
        max_model_len=LONGEST + 64,
        max_num_batched_tokens=chunk,
        max_num_seqs=16,
        enable_prefix_caching=True,
        max_logprobs=5,
        kv_cache_dtype=cache_dtype,
    )
    if measures_free_memory():
        # A page of 16 tokens of SmolLM2-135M takes 360 KiB.
        # They start one after the other, so they do it without graphs.
        engine |= {
            "num_gpu_blocks_override": (10 << 20) // 360, "gpu_memory_utilization": 0.3, "enforce_eager": True,
        }  # fmt: skip
    else:
        # All start at once, and each looks whether the share of the memory that it is given is free.
        engine |= {"kv_cache_memory_bytes": 10 << 30, "gpu_memory_utilization": 0.15}
    lock = str(folder / "lock") if measures_free_memory() else None
    job = dict(engine=engine, prompts=prompts, max_tokens=MAX_TOKENS, options=options, start_lock=lock)
    # FlashPrefill refuses what it does not know, such as the variables of these tests.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLASHPREFILL")}
    environment = {
        **inherited, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    result, _ = run_job("gpu_engine_job", job, environment, timeout=500)
    return result


def run_all(folder, prompts, runs):
    with ThreadPoolExecutor(len(runs)) as pool:
        return dict(zip(runs, pool.map(lambda name: run(folder, prompts, *runs[name]), runs), strict=True))


def check_counts(flash):
    counted = flash["stats"]
    assert sum(answer["cached"] for answer in flash["answers"]) > 0, "no prefix was found in the cache"
    assert counted["kept_blocks"] == counted["visible_blocks"] > 0
    assert counted["sparse_tokens"] > 10 * counted["dense_tokens"]["short_prompt"]


def compare(ours, theirs):
    """(requests whose tokens differ, how much likelier theirs was at the first difference, where both are known, mean
    difference of the log-probabilities up to there)."""
    gaps, differences = [], []
    for a, b in zip(ours["answers"], theirs["answers"], strict=True):
        for token, other, logprobs, other_logprobs in zip(
            a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True
        ):
            shared = logprobs.keys() & other_logprobs.keys()
            differences += [abs(logprobs[t] - other_logprobs[t]) for t in shared]
            if token != other:
                known = (
                    [other_logprobs[str(other)] - other_logprobs[str(token)]] if str(token) in other_logprobs else []
                )
                gaps.append(known)
                break
    return len(gaps), max(itertools.chain(*gaps), default=0.0), statistics.mean(differences)


@needs_vllm
@needs_model
def test_alpha_0_gives_the_default_backends_tokens(tmp_path):
    prompts = make_requests()
    runs = {
        f"{who} {chunk}": (chunk, o) for chunk in (2048, 8192) for who, o in (("default", None), ("flash", ALPHA_0))
    }
    results = run_all(tmp_path, prompts, runs)

    # What chunking alone changes in vLLM's own results is the noise.
    noise = compare(results["default 2048"], results["default 8192"])
    print(f"default at 2048 and 8192: {noise}")
    for chunk in (2048, 8192):
        flash, default = results[f"flash {chunk}"], results[f"default {chunk}"]
        differing, gap, difference = compare(flash, default)
        print(f"chunks of {chunk}: {differing} of {NUM_REQUESTS} differ, gap {gap:.3f}, mean {difference:.4f}")
        print(flash["stats"])
        check_counts(flash)
        assert difference <= 1.5 * noise[2] + 1e-3
        assert differing <= 1.5 * noise[0] + 2
        assert gap <= 1.5 * noise[1] + 0.1


@needs_vllm
@needs_model
@needs_hopper
def test_alpha_0_over_an_fp8_cache_is_nearer_to_vllms_own_than_that_is_to_16_bits(tmp_path):
    """vLLM rounds queries and probabilities to e4m3 too, the kernels do not."""
    prompts = make_requests()
    results = run_all(
        tmp_path,
        prompts,
        {
            "16 bits": (8192, None),
            "default": (8192, None, "fp8"),
            "flash 2048": (2048, ALPHA_0, "fp8"),
            "flash 8192": (8192, ALPHA_0, "fp8"),
        },
    )
    rounding = compare(results["default"], results["16 bits"])
    print(f"an fp8 cache and 16 bits: {rounding}")
    for chunk in (2048, 8192):
        flash = results[f"flash {chunk}"]
        differing, gap, difference = compare(flash, results["default"])
        print(f"chunks of {chunk}: {differing} of {NUM_REQUESTS} differ, gap {gap:.3f}, mean {difference:.4f}")
        print(flash["stats"])
        check_counts(flash)
        assert set(flash["stats"]["dense_tokens"]) <= {"decode", "short_prompt", "nothing_to_prune"}
        assert difference <= rounding[2]
        assert differing <= rounding[0]
        assert gap <= rounding[1] + 0.1
