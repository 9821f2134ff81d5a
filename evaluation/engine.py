"""One vLLM engine, dense or with FlashPrefill, over prepared prompts; a process of its own, which __main__.py starts.

    python engine.py JOB PROMPTS RESULT

All are JSON objects. A sparse engine goes through the prompts once for each setting: options are changed while it runs.
RESULT is written after each task; what is in it already is not run again.
"""

from __future__ import annotations

import dataclasses
import functools
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
# Where the alpha of a density is looked for, and how often the range is halved.
LEAST_ALPHA, HALVINGS = 1e-4, 10
# Whether a layer is dense is settled at its first step.
FIXED_OPTIONS = ("block_size", "num_dense_layers")


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
        vllm_flashprefill.register(**options_of(job))
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


def options_of(job: dict[str, Any]) -> dict[str, Any]:
    """Those of all settings. No density guard, and no short append is dense: what is measured is a selection, also
    where little is pruned, and what a guard does follows from the prompts and the setting before.
    """
    return {"max_density": 1.0, "min_append_tokens": 0, **job["options"]}


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

    def run_all(self, setting: dict[str, Any], save: Callable[[], None]) -> None:
        """Adds what the setting lacks: answers and predictions in the job's order, and the counts of each task."""
        for kind, run in (("samples", self.answer), ("texts", self.predict)):
            prompts = self.job[kind]
            found = setting.setdefault(kind, [None] * len(prompts))
            for part in dict.fromkeys((prompt["length"], prompt["task"]) for prompt in prompts):
                places = [n for n, prompt in enumerate(prompts) if (prompt["length"], prompt["task"]) == part]
                if all(found[place] is not None for place in places):
                    continue
                here = [prompts[place] for place in places]
                results, counts = self.counted(lambda run=run, here=here: run(here))
                for place, result in zip(places, results, strict=True):
                    found[place] = result
                length, task = part
                setting["counts"].append({"of": kind, "length": length, "task": task, **counts})
                name, seconds = setting["name"], counts["seconds"]
                print(f"{name}: {len(here)} {task} of {length} tokens in {seconds} s", flush=True)
                save()

    def alpha_for(self, density: float, others: dict[str, Any]) -> float:
        """The alpha that keeps this share of blocks of the calibration texts, by halving its logarithm."""
        low, high = math.log(LEAST_ALPHA), 0.0
        for step in range(HALVINGS):
            alpha = float(f"{math.exp((low + high) / 2):.3g}")
            self.use({**others, "alpha": alpha})
            texts = [
                {"tokens": tokens, "group": f"calibration {step}/{number}"}
                for number, tokens in enumerate(self.job["calibration"])
            ]
            _, counts = self.counted(lambda texts=texts: self.generate(texts))
            if not counts["visible_blocks"]:
                sys.exit("error: nothing of the calibration texts is sparse, so no value gives a density")
            found = counts["kept_blocks"] / counts["visible_blocks"]
            print(f"calibration: alpha {alpha:g}, density {found:.2%}", flush=True)
            low, high = (math.log(alpha), high) if found > density else (low, math.log(alpha))
            if abs(found / density - 1) < 0.01:
                break
        if abs(found / density - 1) > 0.05:
            print(f"calibration: no alpha gives {density:.2%}; the nearest tried gives {found:.2%}", flush=True)
        return alpha


def setting_name(config: Any, options: dict[str, Any]) -> str:
    """Alpha, and what is neither as the package has it nor among the options of all settings."""
    usual = {field.name: field.default for field in dataclasses.fields(config)} | options
    names = [name for name, value in usual.items() if getattr(config, name) != value]
    values = {name: getattr(config, name) for name in dict.fromkeys(["alpha", *names])}
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in values.items())


def run_settings(engine: Engine, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Each setting asked for, then those whose alpha is to be found for a density, one for each set of others."""
    from vllm_flashprefill.config import FlashPrefillConfig

    job, settings = engine.job, result["settings"]
    # An option of a setting as if the engine had been given it: its preset may not hold beside it.
    config_of = functools.partial(FlashPrefillConfig.from_vllm, engine.llm.llm_engine.vllm_config)
    used = config_of()

    def changes(config: FlashPrefillConfig) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(config).items() if name not in FIXED_OPTIONS}

    plan = [(options, None) for options in job["settings"]]
    if job["target_density"]:
        others = [{name: value for name, value in each.items() if name != "alpha"} for each in job["settings"]]
        unlike = [each for place, each in enumerate(others) if each not in others[:place]]
        plan += [(each, {"density": job["target_density"], "others": each}) for each in unlike]
    for options, target in plan:
        setting = next((each for each in settings if target and each["calibrated"] == target), None)
        if setting is None:
            here = config_of(first=options)
            if target:
                found = engine.alpha_for(target["density"], changes(here))
                here, used = dataclasses.replace(here, alpha=found), None
            setting = next((each for each in settings if each["config"] == dataclasses.asdict(here)), None)
        if setting is None:
            setting = {"name": setting_name(here, options_of(job)), "config": dataclasses.asdict(here), "counts": []}
            settings.append(setting)
        setting["calibrated"] = target or setting.get("calibrated")
        here = FlashPrefillConfig(**setting["config"])
        if here != used:
            engine.use(changes(here))
            used = here
        engine.run_all(setting, save)


def main(job_path: str, prompts_path: str, result_path: str) -> None:
    job = {**json.loads(Path(job_path).read_text()), **json.loads(Path(prompts_path).read_text())}
    engine, path = Engine(job), Path(result_path)
    result = {"job": job["job"], "what_ran": what_ran(engine.llm), "settings": []}
    if path.exists():
        earlier = json.loads(path.read_text())
        if all(earlier[name] == result[name] for name in ("job", "what_ran")):
            result = earlier
    result["complete"] = False

    def save() -> None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(result))
        part.replace(path)

    engine.generate([{"tokens": (job["samples"] or job["texts"])[0]["tokens"][:32]}])
    if job["mode"] == "dense":
        result["settings"] = result["settings"] or [{"name": "dense", "config": None, "counts": []}]
        engine.run_all(result["settings"][0], save)
    else:
        run_settings(engine, result, save)
    result["complete"] = True
    save()


if __name__ == "__main__":
    main(*sys.argv[1:])
