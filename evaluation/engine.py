"""One vLLM engine, dense or with FlashPrefill, over prepared prompts; a process of its own, which __main__.py starts.

    python engine.py JOB PROMPTS RESULT

All are JSON objects. A sparse engine goes through the prompts once for each setting: options are changed while it runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On a GPU, the density of a step is known a little after its answer.
COUNTS_ARRIVE_SECONDS = 0.1
# Tokens of a step with prompt log-probabilities: each takes a few logits of the whole vocabulary.
TEXT_STEP = 2048
# Where the value of a density is looked for, and how often it is halved.
LEAST, HALVINGS = {"alpha": 1e-4, "min_share": 1e-7}, 10


def start(job: dict[str, Any]) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # `configure` is sent to the workers.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    import vllm_flashprefill

    if job["mode"] == "dense":
        # Whatever the shell asks for.
        os.environ["FLASHPREFILL"] = "0"
    else:
        # What is measured is a selection, also where so little is pruned that a layer would be dense for it.
        vllm_flashprefill.register(**{"max_density": 1.0, **job["options"]})
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        # Where the scheduler can be reached. On the CPU, an engine core in this process is several times slower.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=job["max_model_len"],
        max_num_batched_tokens=job["batched_tokens"],
        enable_prefix_caching=True,
        seed=0,
        **job["engine"],
    )


def what_ran(llm: Any) -> dict[str, Any]:
    import torch
    import vllm

    platform = vllm.platforms.current_platform
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": platform.get_device_name() if platform.is_cuda() else platform.device_name,
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
    }


def configure(worker: Any, options: dict[str, Any]) -> int:
    """Change FlashPrefill's options in a worker of a running engine; how many layers and builders follow."""
    runner = worker.model_runner
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    owners = [getattr(layer, "impl", None) for layer in layers]
    if hasattr(runner, "attn_groups"):
        owners += [builder for kind in runner.attn_groups for group in kind for builder in group.metadata_builders]
    else:  # vLLM 0.10.0
        owners += runner.attn_metadata_builders
    owners = [owner for owner in owners if hasattr(owner, "flashprefill_config")]
    for owner in owners:
        owner.flashprefill_config = dataclasses.replace(owner.flashprefill_config, **options)
    return len(owners)


class Engine:
    """A running engine, and the setting its cached keys and values belong to."""

    def __init__(self, job: dict[str, Any]) -> None:
        import vllm_flashprefill

        self.job, self.llm, self.read_stats = job, start(job), vllm_flashprefill.stats
        self.setting = job["mode"]
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        self.scheduler = getattr(core, "scheduler", None)

    def use(self, options: dict[str, Any]) -> None:
        if not all(self.llm.collective_rpc(configure, args=(options,))):
            sys.exit("error: no layer of this engine is FlashPrefill's, so its options cannot be changed")
        self.setting = json.dumps(options)

    def generate(self, prompts: list[dict[str, Any]], **params: Any) -> list[Any]:
        """What vLLM returns, for all prompts at once. Nothing is cached across settings or groups of prompts."""
        from vllm import SamplingParams

        inputs = [
            {"prompt_token_ids": prompt["tokens"], "cache_salt": f"{self.setting}/{prompt.get('group', number)}"}
            for number, prompt in enumerate(prompts)
        ]
        every = [SamplingParams(temperature=0, max_tokens=prompt.get("max_tokens", 1), **params) for prompt in prompts]
        return self.llm.generate(inputs, every, use_tqdm=False)

    def answer(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = self.generate(prompts)
        return [{"text": output.outputs[0].text, "cached": output.num_cached_tokens or 0} for output in outputs]

    def predict(self, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each token from `first` on: its log-probability, and the token that the model would have put there."""
        whole_step = getattr(self.scheduler, "max_num_scheduled_tokens", None)
        if whole_step is not None:
            self.scheduler.max_num_scheduled_tokens = min(whole_step, TEXT_STEP)
        found = []
        # One after the other: the log-probabilities of a whole text are some hundred bytes a token.
        for text in texts:
            (output,) = self.generate([text], prompt_logprobs=1, detokenize=False)
            steps = list(zip(text["tokens"], output.prompt_logprobs, strict=True))[text["first"] :]
            found.append(
                {
                    "logprobs": [round(step[token].logprob, 5) for token, step in steps],
                    "predicted": [min(step, key=lambda token: step[token].rank) for _, step in steps],
                }
            )
        if whole_step is not None:
            self.scheduler.max_num_scheduled_tokens = whole_step
        return found

    def counted(self, run: Callable[[], list[Any]]) -> tuple[list[Any], dict[str, Any]]:
        before, started = self.read_stats(), time.perf_counter()
        results = run()
        seconds = time.perf_counter() - started
        time.sleep(COUNTS_ARRIVE_SECONDS)
        done = self.read_stats() - before
        return results, {
            "seconds": round(seconds, 2),
            "kept_blocks": done.kept_blocks,
            "visible_blocks": done.visible_blocks,
            "sparse_tokens": done.sparse_tokens,
            "dense_tokens": done.dense_tokens,
        }

    def run_all(self) -> dict[str, Any]:
        """Answers and predictions in the job's order, and what was counted for each length."""
        result: dict[str, Any] = {"counts": []}
        for kind, run in (("samples", self.answer), ("texts", self.predict)):
            prompts = self.job[kind]
            found: dict[int, Any] = {}
            for length in dict.fromkeys(prompt["length"] for prompt in prompts):
                places = [place for place, prompt in enumerate(prompts) if prompt["length"] == length]
                here = [prompts[place] for place in places]
                results, counts = self.counted(lambda run=run, here=here: run(here))
                found |= dict(zip(places, results, strict=True))
                result["counts"].append({"of": kind, "length": length, **counts})
                print(f"{self.setting}: {len(here)} {kind} of {length} tokens in {counts['seconds']} s", flush=True)
            result[kind] = [found[place] for place in range(len(prompts))]
        return result

    def options_for(self, density: float, name: str) -> dict[str, Any]:
        """Alpha or min_share that keeps this share of blocks of the calibration texts, by halving its logarithm."""
        low, high = math.log(LEAST[name]), 0.0
        for step in range(HALVINGS):
            middle = (low + high) / 2
            options = options_of(name, float(f"{math.exp(middle):.3g}"))
            self.use(options)
            texts = [
                {"tokens": tokens, "group": f"calibration {step}/{number}"}
                for number, tokens in enumerate(self.job["calibration"])
            ]
            _, counts = self.counted(lambda texts=texts: self.generate(texts))
            if not counts["visible_blocks"]:
                sys.exit("error: nothing of the calibration texts is sparse, so no value gives a density")
            found = counts["kept_blocks"] / counts["visible_blocks"]
            print(f"calibration: {name} {options[name]:g}, density {found:.2%}", flush=True)
            low, high = (middle, high) if found > density else (low, middle)
            if abs(found / density - 1) < 0.01:
                break
        if abs(found / density - 1) > 0.05:
            print(f"calibration: no {name} gives {density:.2%}; the nearest tried gives {found:.2%}", flush=True)
        return options


def options_of(name: str, value: float) -> dict[str, Any]:
    """Blocks are chosen by alpha alone where min_share is 0, else by min_share alone."""
    return {"alpha": value, "min_share": 0.0} if name == "alpha" else {name: value}


def main(job_path: str, prompts_path: str, result_path: str) -> None:
    job = {**json.loads(Path(job_path).read_text()), **json.loads(Path(prompts_path).read_text())}
    engine = Engine(job)
    engine.generate([{"tokens": (job["samples"] or job["texts"])[0]["tokens"][:32]}])
    settings = []
    if job["mode"] == "dense":
        settings.append({"name": "dense", "config": None, **engine.run_all()})
    else:
        from vllm_flashprefill.config import FlashPrefillConfig

        config = FlashPrefillConfig.from_vllm(engine.llm.llm_engine.vllm_config)
        asked = [None if value is None else options_of(name, value) for name, value in job["settings"]]
        chosen = []
        if job["target_density"]:
            chosen = [engine.options_for(job["target_density"], name) for name in job["target_options"]]
        ran = []
        for options in [*asked, *chosen]:
            here = dataclasses.replace(config, **(options or {}))
            if here in ran:
                continue
            if here != config or chosen or ran:
                engine.use({name: getattr(here, name) for name in LEAST})
            ran.append(here)
            settings.append(
                {
                    "name": f"min_share {here.min_share:g}" if here.row_share else f"alpha {here.alpha:g}",
                    "calibrated": options in chosen,
                    "config": dataclasses.asdict(here),
                    **engine.run_all(),
                }
            )
    Path(result_path).write_text(
        json.dumps({"job": job["job"], "what_ran": what_ran(engine.llm), "settings": settings})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
