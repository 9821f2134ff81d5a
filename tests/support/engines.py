"""Engines of the installed vLLM. Most tests run the engine core in this process, which is a minute faster to
start; `run_engine` runs it as vLLM does by default, in a process of its own."""

import contextlib
import functools
import gc
import os
import re
import sys

import pytest

from tests.support import MODEL, ROOT
from tests.support.engine_job import answer
from tests.support.jobs import run_job

# Of the fixtures `few_layers` and `small_model`.
LAYERS, SMALL_LAYERS = 6, 2

# As little as possible is always kept, so that prompts of a few blocks have something to prune.
BARE = {"num_sink_blocks": 0, "num_window_blocks": 1, "num_dense_tail_blocks": 0, "min_sparse_tokens": 0}
EXACT = {"alpha": 0.0, **BARE}

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(**more):
    """The environment of a process that starts its engine as vLLM does by default."""
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in apart}
    return {**env, **more}


def engine_arguments(**changes):
    """Steps of few tokens and requests, since an engine starts with the largest step it may get."""
    return {
        "model": str(MODEL),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "seed": 0,
        **changes,
    }


@contextlib.contextmanager
def engine(options=None, **changes):
    """An engine in this process, with FlashPrefill where there are options; a call generates one batch.

    The call takes [(prompt token ids, tokens to generate)] and returns (answers, the stats of the batch).
    """
    from vllm import LLM

    import vllm_flashprefill

    if options is not None:
        vllm_flashprefill.register(**options)

    def generate(batch):
        before = vllm_flashprefill.stats()
        answers = answer(generate.llm, batch)
        return answers, vllm_flashprefill.stats() - before

    try:
        generate.llm = LLM(**engine_arguments(**changes))
        yield generate
    finally:
        generate.llm = None
        free_engine()
        vllm_flashprefill.revert()


def free_engine():
    """Free what an engine that nothing names any more holds.

    vLLM 0.12.0 freezes it out of the garbage collector's sight, and a cache of its keeps the model's methods. The next
    engine of the process would go on with its KV connector.
    """
    # 0.10.0 has no such function.
    shutdown = getattr(sys.modules.get("vllm.distributed.kv_transfer"), "ensure_kv_transfer_shutdown", None)
    if shutdown is not None:
        shutdown()
    gc.unfreeze()
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and cached.__name__ == "supports_kw":
            cached.cache_clear()
    gc.collect()


def run_engine(batches, *, env, passes=({},), **changes):
    """Run batches through an engine core in its own process; see `engine_job`. changes: of `engine_arguments`.

    Returns:
        ([{"answers", "stats"} of each batch of each pass], everything the processes wrote)
    """
    engine = engine_arguments(**{"max_model_len": 4096, **changes})
    job = {"engine": engine, "batches": batches, "passes": list(passes)}
    return run_job("engine_job", job, environment(PYTHONPATH=str(ROOT), **env))


def assert_same(answers, expected, logprob_tolerance=2e-3):
    """Same greedy tokens, and log-probabilities within rounding of float32."""
    assert len(answers) == len(expected)
    for got, other in zip(answers, expected, strict=True):
        assert got["tokens"] == other["tokens"]
        assert got["logprobs"] == pytest.approx(other["logprobs"], abs=logprob_tolerance)


def flashprefill_metrics(text):
    """{name and labels: value} of FlashPrefill's in what /metrics says, without reasons of which there was nothing."""
    found = re.findall(r"^vllm:flashprefill_(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if "reason" not in name or float(value)}


def vllm_version():
    import vllm

    return re.match(r"\d+\.\d+\.\d+", vllm.__version__).group()
