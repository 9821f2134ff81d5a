"""One vLLM engine, dense or with FlashPrefill, over prepared prompts; a process of its own, started by evaluate.py.

    python engine.py JOB RESULTS

JOB is a JSON object; RESULTS gets a JSON object a line: what ran, then one for each prompt and one for each text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On a GPU, the density of a step is known a little after its answer.
COUNTS_ARRIVE_SECONDS = 0.1


def start(job: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
    """The engine, and a function that reads what FlashPrefill has done."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import vllm_flashprefill

    if job["mode"] == "dense":
        # Whatever the shell asks for.
        os.environ["FLASHPREFILL"] = "0"
    else:
        vllm_flashprefill.register(**job["options"])
    from vllm import LLM

    llm = LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=job["max_model_len"],
        max_num_batched_tokens=job["batched_tokens"],
        enable_prefix_caching=True,
        seed=0,
        **job["engine"],
    )
    return llm, vllm_flashprefill.stats


def what_ran(llm: Any, mode: str) -> dict[str, Any]:
    import torch
    import vllm

    from vllm_flashprefill.config import FlashPrefillConfig

    config = FlashPrefillConfig.from_vllm(llm.llm_engine.vllm_config) if mode == "sparse" else None
    platform = vllm.platforms.current_platform
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": platform.get_device_name() if platform.is_cuda() else platform.device_name,
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "config": config and dataclasses.asdict(config),
    }


def answer(llm: Any, tokens: list[int], max_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    output = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0]
    return {"text": output.outputs[0].text, "cached": output.num_cached_tokens or 0}


def predict(llm: Any, tokens: list[int], first: int) -> dict[str, Any]:
    """For each token from `first` on: its log-probability, and the token that the model would have put there."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    output = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0]
    steps = list(zip(tokens, output.prompt_logprobs, strict=True))[first:]
    return {
        "logprobs": [step[token].logprob for token, step in steps],
        "predicted": [min(step, key=lambda token: step[token].rank) for _, step in steps],
    }


def main(job_path: str, results_path: str) -> None:
    from tqdm import tqdm

    job = json.loads(Path(job_path).read_text())
    llm, read_stats = start(job)
    samples, texts = job["samples"], job["texts"]
    answer(llm, (samples or texts)[0]["tokens"][:32], 1)
    total = sum(len(prompt["tokens"]) for prompt in samples + texts)
    with (
        open(results_path, "w") as results,
        tqdm(total=total, desc=job["mode"], unit="tok", mininterval=1) as bar,
    ):

        def put(result: dict[str, Any]) -> None:
            results.write(json.dumps(result) + "\n")
            results.flush()

        put({"job": job["job"], **what_ran(llm, job["mode"])})
        group = None
        for prompt in samples + texts:
            if prompt.get("group") is None or prompt["group"] != group:
                llm.reset_prefix_cache()
            group = prompt.get("group")
            before, started = read_stats(), time.perf_counter()
            if "max_tokens" in prompt:
                result = answer(llm, prompt["tokens"], prompt["max_tokens"])
            else:
                result = predict(llm, prompt["tokens"], prompt["first"])
            result["seconds"] = round(time.perf_counter() - started, 3)
            time.sleep(COUNTS_ARRIVE_SECONDS)
            done = read_stats() - before
            put({**result, "kept_blocks": done.kept_blocks, "visible_blocks": done.visible_blocks})
            bar.update(len(prompt["tokens"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
