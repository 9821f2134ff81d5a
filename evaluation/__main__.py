"""How much a model loses with FlashPrefill: dense and sparse side by side on long prompts.

    python -m evaluation                                        SmolLM2-135M on vLLM's CPU engine
    python -m evaluation --model PATH --lengths 8192,32768 --samples 20 --alpha default,0.6 --parallel
    python -m evaluation --model PATH --lengths 32000 --setting alpha=0.6 --setting alpha=0.08,piece_size=0
    python -m evaluation --model PATH --lengths 32768 --data ruler/     or InfiniteBench's, LongBench's
    python -m evaluation --draw result.json                     the heat map of an earlier run

RULER's kinds of tasks are made from local text, by seed and tokenizer alone; perplexity and the next token are those
of the last tokens of long prose and code. There are two vLLM engines, each in a process of its own: a dense one, and
one with FlashPrefill that takes one setting after the other. Its options are those that the model gets, its preset or
FLASHPREFILL_* variables, unless --alpha, --setting, --target-density or --min-sparse-tokens ask for others. All prompts
of a task and length go through the engine together, and their answers are kept from then on: ended by SIGTERM, as by
timeout(1), it reports what both engines have done, and goes on from there with --resume.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation import readers, report
from evaluation.engine import FIXED_OPTIONS
from evaluation.prompts import encode
from evaluation.tasks import TASKS, Maker, Sample, bos_tokens, make_samples
from evaluation.text import Stream, code
from scripts.generate import MODEL, documentation
from tools.rows import append_row, commit_name, read_rows
from vllm_flashprefill.config import TEXT_OPTIONS, FlashPrefillConfig

ENGINE = Path(__file__).with_name("engine.py")


def data_samples(
    tokenizer: Any, records: list[tuple[str, readers.Record]], options: argparse.Namespace, max_length: int
) -> tuple[list[Sample], dict[str, int], dict[str, int]]:
    """The prompts of records, each with its file's name; how many of each task were left out, and how many were cut."""
    samples, left_out, cut = [], {}, {}
    for name, record in records:
        tokens = encode(tokenizer, record, options.chat)
        room = max_length - record.max_tokens
        if len(tokens) > room and (room < 1 or not record.cut):
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
                f"{name}/{len(samples)}",
                record.classes,
            )
        )
    return samples, left_out, cut


def read_data(options: argparse.Namespace) -> tuple[list[tuple[str, readers.Record]], dict[str, list[str]]]:
    """The records of --data, each with its path's name, and the tasks without a metric, each with its files."""
    records, without_metric = [], {}
    for path in options.data:
        found, without = readers.read(path, options.limit)
        records += [(path.name, record) for record in found]
        for task, files in without.items():
            without_metric.setdefault(task, []).extend(files)
    return records, without_metric


def make_texts(maker: Maker, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Texts to predict: prose and code in turn."""
    streams = [maker.stream, Stream(maker.encode, code())] if options.texts else []
    texts = []
    for length in options.lengths:
        for index in range(options.texts):
            stream = streams[index % 2]
            start = random.Random(f"{options.seed}/text/{length}/{index}").randrange(len(stream.tokens))
            tokens = maker.bos + stream.take(start, length - len(maker.bos))
            first = max(1, length - options.predict_last)
            texts.append({"task": "texts", "length": length, "tokens": tokens, "first": first})
    return texts


def calibration_texts(tokenizer: Any, length: int, count: int = 3) -> list[list[int]]:
    """What alpha is chosen on: other text than the tasks and the texts to predict have."""
    stream = Stream(lambda text: tokenizer.encode(text, add_special_tokens=False), documentation())
    bos = bos_tokens(tokenizer)
    starts = [len(stream.tokens) * index // count for index in range(count)]
    return [bos + stream.take(start, length - len(bos)) for start in starts]


class Ended(Exception):
    """This process was told to end."""


def end(*_: Any) -> None:
    # timeout(1) sends its signal twice.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Ended


class Run:
    """An engine at work in a process of its own, dense or sparse. Its result stays beside `out`.

    What an earlier dense run of the same prompts has done is not repeated, whatever the settings of the sparse one;
    what a sparse one has, only where it is to be resumed.
    """

    def __init__(self, mode: str, job: dict[str, Any], prompts: Path, out: Path, keep: bool) -> None:
        self.mode, self.path, self.process = mode, out.with_suffix(f".{mode}.json"), None
        others = ("settings", "target_density", "calibration", *(("options", "commit") if mode == "dense" else ()))
        # Another environment has another vLLM.
        asked = json.dumps({**job, **dict.fromkeys(others), "mode": mode, "environment": sys.prefix}, sort_keys=True)
        self.job = hashlib.sha256(asked.encode() + prompts.read_bytes()).hexdigest()[:16]
        earlier = self.so_far() if keep else None
        if earlier is None:
            self.path.unlink(missing_ok=True)
        elif mode == "dense" and earlier["complete"]:
            print(f"dense: as in {self.path}; --fresh runs it again")
            return
        job_path = prompts.with_name(f"{mode}.json")
        job_path.write_text(json.dumps({**job, "mode": mode, "job": self.job}))
        self.process = subprocess.Popen([sys.executable, str(ENGINE), str(job_path), str(prompts), str(self.path)])

    def so_far(self) -> dict[str, Any] | None:
        """What is done of this job; None if nothing is."""
        result = json.loads(self.path.read_text()) if self.path.exists() else {}
        return result if result.get("job") == self.job else None

    def finish(self) -> None:
        status = 0 if self.process is None else self.process.wait()
        if status == -signal.SIGTERM:
            raise Ended
        if status:
            sys.exit(f"error: the {self.mode} run failed; its message is above")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def run_both(
    job: dict[str, Any], prompts: dict[str, Any], out: Path, parallel: bool, fresh: bool = False, resume: bool = False
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The results of the dense and the sparse engine, run in turn or at the same time, and whether they are whole."""
    runs: list[Run] = []
    ended = False
    with tempfile.TemporaryDirectory() as folder:
        prompts_path = Path(folder, "prompts.json")
        prompts_path.write_text(json.dumps(prompts))
        try:
            for mode, keep in (("dense", not fresh), ("sparse", resume)):
                runs.append(Run(mode, job, prompts_path, out, keep))
                if not parallel:
                    runs[-1].finish()
            for run in runs:
                run.finish()
        except (Ended, KeyboardInterrupt):
            ended = True
        finally:
            for run in runs:
                run.stop()
    results = [run.so_far() for run in runs]
    if len(results) < 2 or None in results:
        sys.exit("error: ended before both engines had answered anything; --resume goes on")
    dense, sparse = results
    if dense["what_ran"] != sparse["what_ran"]:
        sys.exit(f"error: dense ran as {dense['what_ran']}, sparse as {sparse['what_ran']}; use --fresh")
    return dense, sparse, not ended


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def alphas(text: str) -> list[dict[str, Any]]:
        return [{} if part == "default" else setting(f"alpha={part}") for part in text.split(",")]

    def setting(text: str) -> dict[str, Any]:
        options = {}
        for part in () if text == "default" else text.split(","):
            name, _, value = part.partition("=")
            try:
                options[name] = value if name in TEXT_OPTIONS else json.loads(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{part!r} is not default, nor NAME=NUMBER") from None
        try:
            FlashPrefillConfig.from_options(options)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if fixed := [name for name in options if name in FIXED_OPTIONS]:
            raise argparse.ArgumentTypeError(f"{fixed[0]} is fixed while an engine runs; set it as a variable")
        return options

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
    parser.add_argument("--limit", type=int, default=20, help="records of each task in a file (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template, as kvpress' rows always do")
    parser.add_argument(
        "--alpha",
        type=alphas,
        default=[],
        help="one or more, such as default,0.6; default: what the model gets, which is also what runs if none is given",
    )
    parser.add_argument(
        "--setting",
        type=setting,
        action="append",
        default=[],
        help="options such as alpha=0.08,piece_size=0; the others are the model's; may be given again",
    )
    parser.add_argument(
        "--target-density",
        type=float,
        help="also, with the other options of each setting, the alpha that keeps this share of blocks of a calibration "
        "text of the greatest length",
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
    parser.add_argument(
        "--resume", action="store_true", help="keep what the sparse engine did of the same prompts, at this commit"
    )
    parser.add_argument("--rows", type=Path, help="also append the table to this CSV, such as results/accuracy.csv")
    parser.add_argument("--out", type=Path, help="result (default: evaluation.json, with --pool pooled.json)")
    parser.add_argument("--plot", type=Path, help="also draw the heat map, as PNG")
    parser.add_argument(
        "--pool", type=Path, nargs="+", help="only put these results together, of runs alike but for their --seed"
    )
    parser.add_argument("--draw", type=Path, help="only draw this result, beside it or to --plot")
    options = parser.parse_args()
    options.out = options.out or Path("pooled.json" if options.pool else "evaluation.json")
    if options.pool and options.out in options.pool:
        parser.error(f"--out: {options.out} is one of those to --pool")
    if options.data and options.lengths is None:
        parser.error("--data needs --lengths: the greatest is what prompts may have, longer ones are cut or left out")
    options.lengths = options.lengths or [1024, 2048, 4096, 7500]
    if options.target_density is not None and not 0 < options.target_density <= 1:
        parser.error(f"--target-density must be above 0 and at most 1, not {options.target_density}")
    if len(options.samples) == 1:
        options.samples *= len(options.lengths)
    if len(options.samples) != len(options.lengths):
        parser.error("--samples takes one number, or as many as there are --lengths")
    options.setting = [*options.alpha, *options.setting] or [{}]
    if options.fresh and options.resume:
        parser.error("--fresh or --resume, not both")
    options.tasks = [task for task in options.tasks.split(",") if task]
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(unknown)}; known: {', '.join(TASKS)}")
    return options


def model_words(model: str, engine: Mapping[str, Any]) -> str:
    """What a row calls a model: its name, and its KV cache where that was asked for."""
    cache = engine.get("kv_cache_dtype", "auto")
    return Path(model).name + ("" if cache == "auto" else f", {cache} KV cache")


def main() -> None:
    options = parse_arguments()
    # Ended from outside, it ends its engines.
    signal.signal(signal.SIGTERM, end)
    if options.draw:
        from evaluation.heatmap import draw

        draw(json.loads(options.draw.read_text()), options.plot or options.draw.with_suffix(".png"))
        return
    if options.pool:
        try:
            show(report.pool([json.loads(path.read_text()) for path in options.pool]), options)
        except ValueError as error:
            sys.exit(f"error: --pool: {error}")
        return
    if options.model == str(MODEL) and not MODEL.exists():
        sys.exit("error: the model is not there yet; run `make demo`, or scripts/fetch_model.py first")
    try:
        records, without_metric = read_data(options)
    except readers.BadData as error:
        sys.exit(f"error: {error}")
    if without_metric:
        named = [f"{task} ({', '.join(files)})" for task, files in without_metric.items()]
        print(f"no metric here, left out: {'; '.join(named)}")
        if not records:
            sys.exit("error: there is nothing to run")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    max_length, left_out, cut = max(options.lengths), {}, {}
    try:
        if options.data:
            samples, left_out, cut = data_samples(tokenizer, records, options, max_length)
            texts = []
        else:
            maker = Maker(tokenizer, chat=options.chat)
            samples = make_samples(maker, options.tasks, options.lengths, options.samples, options.seed)
            texts = make_texts(maker, options)
    except (ValueError, RuntimeError) as error:
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
        "settings": options.setting,
        "target_density": options.target_density,
        "calibration": calibration,
        "eager": not options.graphs,
        "max_model_len": max(
            [len(sample.tokens) + sample.max_tokens for sample in samples]
            + [len(tokens) + 1 for tokens in [*calibration, *(text["tokens"] for text in texts)]]
        ),
        "batched_tokens": options.batched_tokens,
        "engine": options.engine,
        "commit": commit_name(None),
    }
    fields = ("tokens", "max_tokens", "group", "length", "task")
    prompts = {
        "samples": [{name: getattr(sample, name) for name in fields} for sample in samples],
        "texts": texts,
    }
    which = {name: getattr(options, name) for name in ("parallel", "fresh", "resume")}
    dense, sparse, whole = run_both(job, prompts, options.out, **which)
    settings = dense["settings"] + sparse["settings"]
    rows = report.sample_rows(samples, settings)
    result = {
        "model": model_words(options.model, options.engine),
        **sparse["what_ran"],
        "commit": job["commit"],
        "complete": whole,
        "seed": options.seed,
        "batched_tokens": options.batched_tokens,
        "target_density": options.target_density,
        "without_metric": without_metric,
        "left_out": left_out,
        "cut": cut,
        "settings": {setting["name"]: setting["config"] for setting in settings},
        "calibrated": [setting["name"] for setting in settings if setting.get("calibrated")],
        "counts": {setting["name"]: setting["counts"] for setting in settings},
        "changes": report.change_rows(rows, settings),
        "predictions": report.prediction_rows(texts, settings),
        "samples": rows,
    }
    show(result, options)
    if not whole:
        sys.exit("error: ended early; the tables are of the tasks done with both engines, and --resume goes on")


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write a result to --out, --rows and --plot, and print its tables."""
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['model']}, vLLM {result['vllm']}, {result['device']}, {result['dtype']}\n")
    print(report.tables(result))
    print(f"Answers: {options.out}")
    if options.rows:
        # What a run that ended early has written, the one that goes on does not write again.
        written = read_rows(options.rows) if options.rows.exists() else []
        for row in report.csv_rows(result):
            if {name: str(value) for name, value in row.items()} not in written:
                append_row(options.rows, row)
    if options.plot:
        from evaluation.heatmap import draw

        draw(result, options.plot)


if __name__ == "__main__":
    try:
        main()
    except Ended:
        sys.exit("error: terminated")
