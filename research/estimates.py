"""Which estimate of a block's attention keeps a real model's answers at equal density, in vLLM on a GPU.

    python -m research.estimates MODEL --out estimates.json --rules exact.128.pub,p8.64.pub,p8.32.pub.c01,published

Rules are those of research/block_scores.py. One engine answers the same prompts dense and once by each rule, whose
selection takes the place of the package's. A rule has one threshold for all layers and heads: the one that keeps
--density of the blocks of other prompts of the same tasks, one of each, from the next seed. While those are looked at,
the model runs with the published score at --alpha. Every answer and threshold goes to --out, and a row for each rule
and task to results/estimates.csv.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.__main__ import calibration_texts
from evaluation.engine import Engine, what_ran
from evaluation.report import interval
from evaluation.scoring import score
from evaluation.tasks import Maker, make_samples
from research.block_scores import Chunk, HeadShares, Rule, block_scores
from tools.rows import RESULTS, append_row, commit_name
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest

TASKS = ("multi_key", "multi_value", "multi_query", "variable_tracking")
PUBLISHED = Rule("published")


class Selector:
    """Selects by a rule in place of the package, and keeps in `heads` what `published.head` needs.

    Takes the place of two names of `kernels.pipeline`, `block_mean`, which is called with each layer's keys, and
    `block_select`, and of `schedule.tiles_of_a_part`. `see`, if set, is called with each chunk, its layer and its
    blocks that only a score can keep.
    """

    def __init__(self) -> None:
        self.rule, self.threshold, self.heads = PUBLISHED, 0.0, HeadShares()
        self.least: float | None = None
        self.see: Callable[[Chunk, int, torch.Tensor], None] | None = None

    def install(self) -> None:
        from vllm_flashprefill.kernels import pipeline, schedule

        # The package's selection says of each list where its parts are; these lists are walked whole.
        schedule.tiles_of_a_part = lambda *_: 0
        self.block_mean = pipeline.block_mean
        pipeline.block_mean, pipeline.block_select = self._block_mean, self._block_select

    def _block_mean(self, kv: KeyValues, *arguments: Any) -> None:
        self.kv = kv
        self.block_mean(kv, *arguments)

    def _block_select(self, q, mean, schedule, slab, *, config, softmax_scale, lists, counts, block_counts=None, **_):
        num_heads, slots = q.shape[2], slab.list_slots * q.shape[2]
        items = schedule.items[slab.first_item : slab.first_item + slab.num_items].long()
        by_item = counts[: slab.num_items * num_heads].view(slab.num_items, num_heads)
        heads = torch.arange(num_heads, device=q.device)[:, None, None]
        # The last slot takes the blocks that are not kept.
        written = lists.new_zeros(slots + 1)
        for index, row in enumerate(schedule.requests.tolist()):
            (here,) = (items[:, 0] == index).nonzero(as_tuple=True)
            if not len(here):
                continue
            request, first_tail_block = request_of(row)
            queries = q[request.batch, request.query_slice]
            chunk = Chunk(queries, self.kv.of_request(request)[0], softmax_scale=softmax_scale)
            # A cache belongs to one layer.
            layer = self.kv.k.data_ptr()
            always, visible = chunk.always(config, first_tail_block), chunk.earlier | chunk.own
            blocks, slot = items[here, 1], items[here, 2]
            at = blocks - chunk.query_blocks[0]
            if self.see is not None:
                in_slab = torch.zeros_like(visible)
                in_slab[at] = True
                self.see(chunk, layer, chunk.earlier & ~always & in_slab)
            scores = block_scores(chunk, self.rule, layer, self.heads, self.least)
            # [H, items, NK]
            kept = (((scores >= self.threshold) | always) & visible)[:, at]
            places = slot[:, None] * num_heads + heads * (blocks + 1)[:, None] + kept.cumsum(dim=-1) - 1
            places = torch.where(kept, places, slots).flatten()
            written.scatter_(0, places, chunk.key_blocks.int().expand_as(kept).flatten())
            by_item[here] = kept.sum(dim=-1).int().T
        lists[:slots] = written[:slots]
        if block_counts is not None:
            block_counts[0] += by_item.sum()
            block_counts[1] += slots


def request_of(row: list[int]) -> tuple[SparseRequest, int]:
    """A request of `Schedule.requests`, and the query block from which on it attends to everything."""
    from vllm_flashprefill.kernels import columns

    request = SparseRequest(
        index=row[columns.TABLE_ROW],
        query_start=row[columns.QUERY_START],
        query_len=row[columns.QUERY_LEN],
        context_len=row[columns.CONTEXT_LEN],
        # What it stands for in a request, the tail, is the other number.
        prompt_len=row[columns.CONTEXT_LEN] + row[columns.QUERY_LEN],
        batch=row[columns.BATCH],
        kv_start=row[columns.KV_START],
    )
    return request, row[columns.FIRST_TAIL_BLOCK]


class Candidates:
    """What `Chunk.largest` must be for a share of the blocks that only a score can keep, from a sample of one pass."""

    RATE = 1 / 64

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []

    def see(self, chunk: Chunk, layer: int, free: torch.Tensor) -> None:
        picked = free & (torch.rand(len(chunk.q), *free.shape, device=free.device) < self.RATE)
        self.samples.append(chunk.largest[picked])

    def least(self, share: float) -> float:
        values = torch.cat(self.samples).sort(descending=True).values
        return float(values[int(share * len(values))])


class Thresholds:
    """The threshold of each rule that keeps as many blocks, from a sample of the scores of one pass."""

    RATE = 1 / 8

    def __init__(self, selector: Selector, rules: Mapping[str, Rule], least: Mapping[str, float] | None = None) -> None:
        self.selector, self.rules, self.least = selector, rules, least or {}
        self.samples: dict[str, list[torch.Tensor]] = {name: [] for name in rules}
        self.free = 0

    def see(self, chunk: Chunk, layer: int, free: torch.Tensor) -> None:
        self.free += int(free.sum()) * len(chunk.q)
        picked = free & (torch.rand(len(chunk.q), *free.shape, device=free.device) < self.RATE)
        for name, rule in self.rules.items():
            scores = block_scores(chunk, rule, layer, self.selector.heads, self.least.get(name))[picked]
            if scores.isnan().any():
                raise RuntimeError(f"{name}: a visible block's score is NaN")
            self.samples[name].append(scores)

    def found(self, density: float, visible: int) -> dict[str, float]:
        """By rule. `visible`: blocks of the pass, all those that are not `free` being kept."""
        fraction = (density * visible - (visible - self.free)) / self.free
        if not 0 < fraction < 1:
            sys.exit(f"error: --density {density:g}: {1 - self.free / visible:.2%} is always kept")
        thresholds = {}
        for name, parts in self.samples.items():
            scores = torch.cat(parts).sort(descending=True).values
            thresholds[name] = float(scores[int(fraction * len(scores))])
            if thresholds[name] == -math.inf:
                sys.exit(f"error: {name}: it has fewer candidates than --density {density:g} keeps")
        return thresholds


def task_rows(result: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A rule's rows of results/estimates.csv: one for each task, and the mean of the tasks as `multi-fact`."""
    rule, answers, dense = Rule.parse(name), result["answers"][name], result["answers"]["dense"]
    tasks = list(dict.fromkeys(sample["task"] for sample in result["samples"]))
    pairs = list(zip(result["samples"], dense["scores"], answers["scores"], strict=True))
    rows = []
    for task, of in [(task, [task]) for task in tasks] + [("multi-fact", tasks)]:
        here = [(sample["task"], sample["group"], d, s) for sample, d, s in pairs if sample["task"] in of]
        low, high = interval((task, group, s - d) for task, group, d, s in here)
        scores = [
            statistics.mean(statistics.mean(pair[place] for pair in here if pair[0] == one) for one in of)
            for place in (2, 3)
        ]
        rows.append(
            {
                **{key: result[key] for key in ("date", "model", "gpu", "vllm", "torch", "commit", "tokens")},
                "estimate": rule.estimate,
                "rows": rule.rows,
                "rule": rule.how,
                "candidates": rule.candidates or (f"{rule.candidate_share:.0%}" if rule.candidate_share else ""),
                "density": round(answers["density"], 4),
                "task": task,
                "n": len(here),
                "dense": round(100 * scores[0], 2),
                "sparse": round(100 * scores[1], 2),
                "change": round(100 * (scores[1] - scores[0]), 2),
                "low": round(100 * low, 2),
                "high": round(100 * high, 2),
                "check": result["check"],
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m research.estimates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("--rules", required=True, help="with commas between them")
    parser.add_argument("--length", type=int, default=32_000, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="prompts of each task (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="of the prompts (default: %(default)s)")
    parser.add_argument("--density", type=float, default=0.17, help="default: %(default)s")
    parser.add_argument("--alpha", type=float, default=0.08, help="while thresholds are found (default: %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=0.6, help="vLLM's gpu_memory_utilization (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="every answer, as JSON")
    parser.add_argument("--csv", type=Path, default=RESULTS / "estimates.csv", help="default: results/estimates.csv")
    parser.add_argument("--commit", help="what rows say of the checkout (default: $COMMIT, or git's)")
    options = parser.parse_args()
    try:
        options.rules = {name: Rule.parse(name) for name in options.rules.split(",")}
    except ValueError as error:
        parser.error(f"--rules: {error}")
    return options


def main() -> None:
    options = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    maker, tasks = Maker(tokenizer), options.tasks.split(",")
    samples = make_samples(maker, tasks, [options.length], [options.samples], options.seed)
    others = make_samples(maker, tasks, [options.length], [1], options.seed + 1)
    engine = Engine(
        {
            "mode": "sparse",
            # The package's own selection is not used, so nothing is pooled for it.
            "options": {"alpha": options.alpha, "piece_size": 0, "min_sparse_tokens": 4096},
            "model": options.model,
            "eager": True,
            "max_model_len": max(len(sample.tokens) + sample.max_tokens for sample in samples) + 1,
            "batched_tokens": 8192,
            "engine": {"gpu_memory_utilization": options.memory},
        }
    )
    torch.backends.cuda.matmul.allow_tf32 = True
    from research.block_mass import check_block_mass

    error = check_block_mass(torch.device("cuda"))
    print(f"kernels agree with PyTorch to {error:.1e}", flush=True)
    selector = Selector()
    selector.install()
    selector.threshold = math.log(options.alpha)
    run = what_ran(engine.llm)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(options.model).name,
        "gpu": run["device"],
        "vllm": run["vllm"],
        "torch": run["torch"],
        "commit": commit_name(options.commit),
        "tokens": options.length,
        "check": f"kernels agree with PyTorch to {error:.1e}",
        "arguments": {name: str(value) for name, value in vars(options).items()},
        "samples": [{"task": s.task, "group": s.group, "expected": s.expected} for s in samples],
        "thresholds": {},
        "answers": {},
    }

    def pass_over(name: str, token_lists: list[list[int]], see: Callable | None) -> dict[str, Any]:
        """One pass of the model without an answer; what was counted."""
        engine.setting, selector.see = name, see
        _, counts = engine.counted(lambda: engine.generate([{"tokens": tokens} for tokens in token_lists]))
        selector.see = None
        return counts

    def answer(name: str) -> None:
        engine.setting = name
        prompts = [{"tokens": s.tokens, "max_tokens": s.max_tokens, "group": s.group} for s in samples]
        answers, counts = engine.counted(lambda: engine.answer(prompts))
        texts = [each["text"] for each in answers]
        visible = counts["visible_blocks"]
        result["answers"][name] = {
            "density": counts["kept_blocks"] / visible if visible else 1.0,
            "seconds": counts["seconds"],
            "scores": [score(s.metric, text, s.expected, s.classes) for s, text in zip(samples, texts, strict=True)],
            "texts": texts,
        }
        options.out.write_text(json.dumps(result))
        if name != "dense":
            rows = task_rows(result, name)
            for row in rows:
                append_row(options.csv, row)
            print("{0}: density {density:.2%}, {change:+.1f} ({low:+.1f} to {high:+.1f})".format(name, **rows[-1]))

    pass_over("warm-up", [samples[0].tokens[:64]], None)
    if any(rule.how == "head" for rule in options.rules.values()):
        pass_over("heads", calibration_texts(tokenizer, options.length), selector.heads.see)
        selector.heads.fit()
    others = [sample.tokens for sample in others]
    shares = {name: rule.candidate_share for name, rule in options.rules.items() if rule.candidate_share}
    candidates = Candidates()
    if shares:
        pass_over("candidates", others, candidates.see)
    least = {name: candidates.least(share) for name, share in shares.items()}
    thresholds = Thresholds(selector, options.rules, least)
    counts = pass_over("thresholds", others, thresholds.see)
    print("candidates:", least, flush=True)
    result["thresholds"] = thresholds.found(options.density, counts["visible_blocks"])

    usual = engine.job["options"]
    engine.use({**usual, "min_sparse_tokens": options.length * 2})
    answer("dense")
    engine.use(usual)
    for name, rule in options.rules.items():
        selector.rule, selector.threshold, selector.least = rule, result["thresholds"][name], least.get(name)
        answer(name)
    print(f"answers: {options.out}")


if __name__ == "__main__":
    main()
