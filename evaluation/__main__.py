"""How much a model loses with FlashPrefill: dense and sparse side by side on long prompts.

    python -m evaluation                                        SmolLM2-135M on vLLM's CPU engine
    python -m evaluation --model PATH --lengths 8192,32768 --samples 20 --alpha default,0.02 --parallel
    python -m evaluation --model PATH --lengths 32768 --data ruler/     or InfiniteBench's, LongBench's
    python -m evaluation --draw result.json                     the heat map of an earlier run

RULER's kinds of tasks are made from local text, by seed and tokenizer alone; perplexity and the next token are those
of the last tokens of long prose and code. There are two vLLM engines, each in a process of its own: a dense one, and
one with FlashPrefill that takes one setting after the other. Its options are those that the model gets, its preset or
FLASHPREFILL_* variables, unless --alpha, --target-density or --min-sparse-tokens ask for others. All prompts of a
length go through the engine together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evaluation import readers, report
from evaluation.tasks import TASKS, Maker, Sample, bos_tokens, make_samples
from evaluation.text import Stream, code
from scripts.generate import MODEL, documentation
from tools.rows import commit_name

ENGINE = Path(__file__).with_name("engine.py")


def data_samples(
    tokenizer: Any, options: argparse.Namespace, max_length: int
) -> tuple[list[Sample], dict[str, int], dict[str, int]]:
    """The prompts of local data sets; how many of each task were too long and left out, and how many were cut."""
    samples, left_out, cut = [], {}, {}
    for path in options.data:
        for record in readers.read(path, options.limit):
            prompt, encode_bos = record.prompt, True
            if options.chat:
                turn = [{"role": "user", "content": prompt}]
                prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
                encode_bos = False
            tokens = tokenizer.encode(prompt + record.answer_prefix, add_special_tokens=encode_bos)
            room = max_length - record.max_tokens
            if len(tokens) > room and not record.cut:
                left_out[record.task] = left_out.get(record.task, 0) + 1
                continue
            if len(tokens) > room:
                cut[record.task] = cut.get(record.task, 0) + 1
            tokens = readers.cut_middle(tokens, room)
            length = next((length for length in sorted(options.lengths) if len(tokens) <= length), max_length)
            samples.append(
                Sample(
                    record.task,
                    length,
                    None,
                    tokens,
                    record.expected,
                    record.metric,
                    record.max_tokens,
                    f"{path.name}/{len(samples)}",
                    record.classes,
                )
            )
    return samples, left_out, cut


def make_texts(maker: Maker, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Texts to predict: prose and code in turn."""
    streams = [maker.stream, Stream(maker.encode, code())] if options.texts else []
    texts = []
    for length in options.lengths:
        for index in range(options.texts):
            stream = streams[index % 2]
            start = random.Random(f"{options.seed}/text/{length}/{index}").randrange(len(stream.tokens))
            tokens = maker.bos + stream.take(start, length - len(maker.bos))
            texts.append({"length": length, "tokens": tokens, "first": max(1, length - options.predict_last)})
    return texts


def calibration_texts(tokenizer: Any, length: int, count: int = 3) -> list[list[int]]:
    """What alpha is chosen on: other text than the tasks and the texts to predict have."""
    stream = Stream(lambda text: tokenizer.encode(text, add_special_tokens=False), documentation())
    bos = bos_tokens(tokenizer)
    starts = [len(stream.tokens) * index // count for index in range(count)]
    return [bos + stream.take(start, length - len(bos)) for start in starts]


class Run:
    """An engine at work in a process of its own, dense or sparse. Its result stays beside `out`.

    A dense run of the same prompts is not repeated, whatever the settings of the sparse one.
    """

    def __init__(self, mode: str, job: dict[str, Any], prompts: Path, out: Path, fresh: bool) -> None:
        self.mode, self.path, self.process = mode, out.with_suffix(f".{mode}.json"), None
        sparse_only = ("options", "settings", "target_density", "target_options", "calibration")
        ignored = dict.fromkeys(sparse_only if mode == "dense" else ())
        # Another environment has another vLLM.
        asked = json.dumps({**job, **ignored, "mode": mode, "environment": sys.prefix}, sort_keys=True).encode()
        same = hashlib.sha256(asked + prompts.read_bytes()).hexdigest()[:16]
        if mode == "dense" and not fresh and self.path.exists():
            if json.loads(self.path.read_text()).get("job") == same:
                print(f"dense: as in {self.path}; --fresh runs it again")
                return
        self.path.unlink(missing_ok=True)
        job_path = prompts.with_name(f"{mode}.json")
        job_path.write_text(json.dumps({**job, "mode": mode, "job": same}))
        self.process = subprocess.Popen([sys.executable, str(ENGINE), str(job_path), str(prompts), str(self.path)])

    def result(self) -> dict[str, Any]:
        if self.process is not None and self.process.wait() != 0:
            sys.exit(f"error: the {self.mode} run failed; its message is above")
        return json.loads(self.path.read_text())

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def run_both(
    job: dict[str, Any], prompts: dict[str, Any], out: Path, fresh: bool, parallel: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of the dense and the sparse engine, one after the other or at the same time."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        prompts_path = Path(folder, "prompts.json")
        prompts_path.write_text(json.dumps(prompts))
        try:
            for mode in ("dense", "sparse"):
                runs.append(Run(mode, job, prompts_path, out, fresh))
                if not parallel:
                    runs[-1].result()
            dense, sparse = [run.result() for run in runs]
            if dense["what_ran"] != sparse["what_ran"]:
                sys.exit(f"error: dense ran as {dense['what_ran']}, sparse as {sparse['what_ran']}; use --fresh")
            return dense, sparse
        finally:
            for run in runs:
                run.stop()


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def values(text: str) -> list[float | None]:
        return [None if part == "default" else float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL), help="model folder or name (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--lengths",
        type=numbers,
        help="prompt tokens (default: 1024,2048,4096,7500); the longest that --data is cut to",
    )
    parser.add_argument("--samples", type=numbers, default=[1], help="prompts of each task, or one number a length")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of %(default)s; empty for none")
    parser.add_argument("--texts", type=int, default=2, help="texts of each length to predict (default: %(default)s)")
    parser.add_argument("--predict-last", type=int, default=1024, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="JSONL files or folders, instead of the tasks")
    parser.add_argument("--limit", type=int, default=20, help="records of each file (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put --data prompts into the model's chat template")
    parser.add_argument(
        "--alpha", type=values, default=[None], help="one or more, such as default,0.02; default: the model's preset"
    )
    parser.add_argument("--min-share", type=values, default=[], help="also these values of min_share")
    parser.add_argument(
        "--target-density",
        type=float,
        help="also the alpha that keeps this share of blocks of a calibration text of the greatest length",
    )
    parser.add_argument(
        "--target-options",
        default="alpha",
        help="what is chosen for --target-density: alpha (default), min_share or alpha,min_share",
    )
    parser.add_argument("--min-sparse-tokens", type=int, help="default: the package's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batched-tokens", type=int, default=4096, help="of a step; fewer take less memory")
    parser.add_argument("--graphs", action="store_true", help="let vLLM compile and capture graphs")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vLLM's LLM, as JSON")
    parser.add_argument(
        "--parallel", action="store_true", help="run both engines at the same time; needs memory for two"
    )
    parser.add_argument("--fresh", action="store_true", help="run dense again though an earlier run is there")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"), help="result (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="also draw the heat map, as PNG")
    parser.add_argument("--draw", type=Path, help="only draw this result, beside it or to --plot")
    options = parser.parse_args()
    if options.data and options.lengths is None:
        parser.error("--data needs --lengths: the greatest is what prompts may have, longer ones are cut or left out")
    options.lengths = options.lengths or [1024, 2048, 4096, 7500]
    if options.target_density is not None and not 0 < options.target_density <= 1:
        parser.error(f"--target-density must be above 0 and at most 1, not {options.target_density}")
    if len(options.samples) == 1:
        options.samples *= len(options.lengths)
    if len(options.samples) != len(options.lengths):
        parser.error("--samples takes one number, or as many as there are --lengths")
    options.target_options = options.target_options.split(",")
    if not {"alpha", "min_share"}.issuperset(options.target_options):
        parser.error("--target-options: alpha, min_share or alpha,min_share")
    options.tasks = [task for task in options.tasks.split(",") if task]
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(unknown)}; known: {', '.join(TASKS)}")
    return options


def main() -> None:
    options = parse_arguments()
    # Ended from outside, it ends its engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    if options.draw:
        from evaluation.heatmap import draw

        draw(json.loads(options.draw.read_text()), options.plot or options.draw.with_suffix(".png"))
        return
    if options.model == str(MODEL) and not MODEL.exists():
        sys.exit("error: the model is not there yet; run `make demo`, or scripts/fetch_model.py first")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    max_length, left_out, cut = max(options.lengths), {}, {}
    try:
        if options.data:
            samples, left_out, cut = data_samples(tokenizer, options, max_length)
            texts = []
        else:
            maker = Maker(tokenizer)
            samples = make_samples(maker, options.tasks, options.lengths, options.samples, options.seed)
            texts = make_texts(maker, options)
    except (readers.Unsupported, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if left_out:
        print(f"longer than {max_length} tokens with their answers, left out: {left_out}")
    if cut:
        print(f"longer than {max_length} tokens, without their middle here: {cut}")
    if not samples and not texts:
        sys.exit("error: there is nothing to run")

    calibration = calibration_texts(tokenizer, max_length) if options.target_density else []
    flash_options = {"min_sparse_tokens": options.min_sparse_tokens}
    job = {
        "model": options.model,
        "options": {name: value for name, value in flash_options.items() if value is not None},
        "settings": [("alpha", value) for value in options.alpha] + [("min_share", v) for v in options.min_share],
        "target_options": options.target_options,
        "target_density": options.target_density,
        "calibration": calibration,
        "eager": not options.graphs,
        "max_model_len": max(
            [len(sample.tokens) + sample.max_tokens for sample in samples]
            + [len(tokens) + 1 for tokens in [*calibration, *(text["tokens"] for text in texts)]]
        ),
        "batched_tokens": options.batched_tokens,
        "engine": options.engine,
    }
    fields = ("tokens", "max_tokens", "group", "length")
    prompts = {
        "samples": [{name: getattr(sample, name) for name in fields} for sample in samples],
        "texts": texts,
    }
    dense, sparse = run_both(job, prompts, options.out, options.fresh, options.parallel)
    settings = dense["settings"] + sparse["settings"]
    rows = report.sample_rows(samples, settings)
    result = {
        "model": Path(options.model).name,
        **sparse["what_ran"],
        "commit": commit_name(None),
        "seed": options.seed,
        "batched_tokens": options.batched_tokens,
        "target_density": options.target_density,
        "left_out": left_out,
        "cut": cut,
        "settings": {setting["name"]: setting["config"] for setting in settings},
        "calibrated": [setting["name"] for setting in settings if setting.get("calibrated")],
        "counts": {setting["name"]: setting["counts"] for setting in settings},
        "lengths": report.length_rows(rows, settings),
        "summary": report.summarise(rows),
        "predictions": report.prediction_rows(texts, settings),
        "samples": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['model']}, vLLM {result['vllm']}, {result['device']}, {result['dtype']}\n")
    print(report.tables(result))
    print(f"Answers: {options.out}")
    if options.plot:
        from evaluation.heatmap import draw

        draw(result, options.plot)


if __name__ == "__main__":
    main()
