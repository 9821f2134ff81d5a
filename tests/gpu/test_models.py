"""Engines of small models of each kind: vLLM's own beside FlashPrefill at alpha 0, on the same prompts.

A kind whose parts of vLLM are not installed, or that vLLM alone is known to refuse, is skipped with the reason.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if not importlib.metadata.version("vllm").startswith("0.24."):
    pytest.skip("the kinds are written as vLLM 0.24.0 reads them", allow_module_level=True)
pytest.importorskip("transformers")

from tests.support import ROOT
from tests.support.jobs import Failed, run_job
from tests.support.model_kinds import IMAGE, KINDS, NUM_TEXT_TOKENS, VISION_END, VISION_START, write

# The prompts of at least MIN_SPARSE tokens do not fit one step of 1,024 together.
LENGTHS = [3000, 1500, 700, 40, 130, 1000]
MIN_SPARSE = 256
NEW_TOKENS = 8
OPTIONS = {
    "FLASHPREFILL": "1",
    "FLASHPREFILL_ALPHA": "0",
    "FLASHPREFILL_MIN_SPARSE_TOKENS": str(MIN_SPARSE),
    "FLASHPREFILL_MIN_APPEND_TOKENS": "0",
    "FLASHPREFILL_NUM_SINK_BLOCKS": "0",
    "FLASHPREFILL_NUM_WINDOW_BLOCKS": "1",
    "FLASHPREFILL_NUM_DENSE_TAIL_BLOCKS": "0",
}
OF_A_REQUEST = {"decode", "short_prompt", "nothing_to_prune"}


def make_job(kind, folder):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, NUM_TEXT_TOKENS, length).tolist() for length in LENGTHS]
    for number in kind.images:
        prompts[number][:3] = [VISION_START, IMAGE, VISION_END]
    engine = {
        "model": str(folder),
        "skip_tokenizer_init": not kind.tokenizer,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096 if "runner" in kind.engine else 1024,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.1,
        # Without it vLLM measures what memory is free, and fails where another process frees some meanwhile.
        "kv_cache_memory_bytes": 1 << 30,
        "seed": 0,
        **kind.engine,
    }
    return {"engine": engine, "prompts": prompts, "images": kind.images, "new_tokens": NEW_TOKENS}


def run(job, plugin_path, options):
    """The answers and statistics of a job, and everything its processes wrote."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASHPREFILL")}
    path = [str(ROOT), str(plugin_path), *filter(None, [env.get("PYTHONPATH")])]
    # In one process all prompts are there when the first step is made up, so that both engines make up the same steps.
    env |= {
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return run_job("model_job", job, {**env, **options}, timeout=400)


@pytest.mark.parametrize("name", KINDS)
def test_alpha_0_is_vllms_own(name, tmp_path, plugin_path):
    kind = KINDS[name]
    missing = missing_library(kind)
    if missing:
        pytest.skip(f"this vLLM has no {missing}")
    write(kind, tmp_path)
    job = make_job(kind, tmp_path)
    try:
        expected, _ = run(job, plugin_path, {})
    except Failed as failure:
        if kind.refused is None or kind.refused not in str(failure):
            raise
        pytest.skip(f"vLLM alone does not run it here: {last_error(str(failure))}")
    result, log = run(job, plugin_path, OPTIONS | kind.options)
    assert "FlashPrefill is registered" in log
    assert "take a slower kernel" not in log
    check_stats(kind, result)
    for got, other in zip(result["answers"], expected["answers"], strict=True):
        if "embedding" in other:
            assert got["embedding"] == pytest.approx(other["embedding"], abs=1e-3)
        else:
            check_answer(got, other, kind.noise)


def missing_library(kind):
    if kind.library is None:
        return None
    if kind.library.startswith("vllm_flash_attn/_vllm_fa2") and torch.cuda.get_device_capability()[0] > 9:
        return None
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    return None if list(folder.glob(kind.library)) else kind.library


def last_error(log):
    errors = [line for line in log.splitlines() if "Error" in line]
    return errors[-1].strip()[:300] if errors else log[-300:]


def check_stats(kind, result):
    stats, lengths = result["stats"], [answer["prompt_tokens"] for answer in result["answers"]]
    dense = dict(stats["dense_tokens"])
    tokens = sum(lengths)
    if "runner" not in kind.engine:
        tokens += len(lengths) * (NEW_TOKENS - 1)
    for reason, layers in kind.dense_layers.items():
        assert dense.pop(reason) >= layers * tokens
        assert kind.drafts or stats["dense_tokens"][reason] <= layers * (tokens + len(lengths))
    assert set(dense) <= OF_A_REQUEST
    if not kind.sparse_layers:
        assert not dense and stats["sparse_tokens"] == 0
        return
    assert stats["kept_blocks"] == stats["visible_blocks"] > 0
    long = sum(length for length in lengths if length >= MIN_SPARSE)
    # A prompt's first chunk of up to a block of tokens has nothing to prune.
    assert 0.9 * kind.sparse_layers * long <= stats["sparse_tokens"] <= kind.sparse_layers * long
    assert dense["decode"] >= kind.sparse_layers * len(lengths) * (NEW_TOKENS - 1) - 2 * len(lengths)
    assert stats["sparse_tokens"] + sum(dense.values()) >= kind.sparse_layers * tokens


def check_answer(got, expected, noise):
    differences = np.abs(np.array(got["prompt"]) - expected["prompt"])
    assert differences.mean() <= noise and differences.max() <= 10 * noise
    for at, (token, other) in enumerate(zip(got["tokens"], expected["tokens"], strict=True)):
        (_, best), (_, second) = expected["steps"][at][:2]
        if token != other:
            assert best - second <= 10 * noise, f"token {at} is another, which was {best - second:.2f} behind"
            return
        assert abs(got["steps"][at][0][1] - best) <= 10 * noise
