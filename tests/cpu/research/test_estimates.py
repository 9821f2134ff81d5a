import math

import pytest
import torch

from research.block_scores import Chunk, Rule, block_scores
from research.estimates import Selector, Thresholds, task_rows
from tests.cpu.kernels.test_interpreted import IMPORTS, needs_triton, run_interpreted
from tests.support.plain_cases import SCALE, tensors
from tests.support.request import paged
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.kernels.schedule import schedule_requests
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest
from vllm_flashprefill.reference import block_select_ref

CONFIG = FlashPrefillConfig(alpha=0.2, num_sink_blocks=1, num_window_blocks=1, num_dense_tail_blocks=1)
# (tokens of the step, tokens before it, tokens of the prompt)
REQUESTS = [(900, 0, 1500), (300, 512, 812), (1, 600, 601)]


@pytest.mark.parametrize("list_bytes", [1 << 20, 300])
def test_a_rule_selects_in_place_of_the_package(list_bytes):
    parts = [tensors(new, new + before, seed=seed) for seed, (new, before, _) in enumerate(REQUESTS)]
    k, table = paged([part[1] for part in parts], 48, seed=0)
    starts = [sum(new for new, _, _ in REQUESTS[:n]) for n in range(3)]
    sparse = [
        SparseRequest(n, start, *request) for n, (start, request) in enumerate(zip(starts, REQUESTS, strict=True))
    ]
    schedule = schedule_requests(
        sparse, num_heads=4, num_dense_tail_blocks=1, device=torch.device("cpu"), list_bytes=list_bytes
    )
    q = torch.cat([part[0] for part in parts])[None]
    selector = Selector()
    selector.rule, selector.threshold, selector.kv = (
        Rule.parse("p8.64.pub"),
        math.log(CONFIG.alpha),
        KeyValues(k, k, table),
    )
    block_counts = torch.zeros(2, dtype=torch.int64)
    seen = 0
    for slab in schedule.slabs:
        lists = torch.full((slab.list_slots * 4,), -1, dtype=torch.int32)
        counts = torch.full((slab.num_items * 4,), -1, dtype=torch.int32)
        selector._block_select(
            q, None, schedule, slab, pieces=None, config=CONFIG, softmax_scale=SCALE, lists=lists, counts=counts,
            scores=None, block_counts=block_counts,
        )  # fmt: skip
        for n, (row, block, slot) in enumerate(schedule.items[slab.first_item :][: slab.num_items].tolist()):
            request, (queries, keys, _) = sparse[row], parts[row]
            score = block_scores(Chunk(queries, keys, softmax_scale=SCALE), selector.rule).exp()
            first = request.context_len // 128
            kept = block_select_ref(
                score, first_query_block=first, num_prompt_blocks=-(-request.prompt_len // 128), config=CONFIG
            )
            for head in range(4):
                count, start = int(counts[n * 4 + head]), slot * 4 + head * (block + 1)
                expected = kept[head, block - first].nonzero().flatten().tolist()
                assert lists[start : start + count].tolist() == expected
                seen += count
    assert block_counts.tolist() == [seen, 4 * sum(request.visible_blocks for request in sparse)]
    assert 0 < block_counts[0] < block_counts[1]


@needs_triton
def test_the_pipeline_asks_the_rule():
    """All stages by Triton's interpreter, with a rule that keeps everything and one that keeps what it must."""
    run_interpreted(
        IMPORTS
        + """
from research.estimates import Rule, Selector
from vllm_flashprefill.kernels import pipeline
from vllm_flashprefill.reference import flash_prefill_ref

config = sparse_config(alpha=0.3)
batch = make_batch(config=config, requests=[Request(700, 57, 200)], page_size=48, heads=2, kv_heads=1)
selector = Selector()
long = dict(config=config, requests=[Request(20, 4200)], page_size=256, heads=2, kv_heads=1, part_tiles=None)
assert any(slab.part_tiles for slab in make_batch(**long).schedule.slabs)
selector.install()
assert not any(slab.part_tiles for slab in make_batch(**long).schedule.slabs)
for rule, threshold, alpha in (("p16.32.pub", -float("inf"), 0.0), ("published", 1.0, 1.0)):
    selector.rule, selector.threshold = Rule.parse(rule), threshold
    out, counts = torch.zeros_like(batch.q), torch.zeros(2, dtype=torch.int64)
    pipeline.run_stages(
        batch.q, batch.kv, batch.schedule, config=config, softmax_scale=0.125, out=out, block_counts=counts
    )
    if alpha == 0:
        q, k, v = (part.float() for part in batch.parts[0])
        expected = flash_prefill_ref(q, k, v, config=sparse_config(alpha=0.0), softmax_scale=0.125, prompt_len=957)
        assert (out[0] - expected).abs().max() < 0.01
        assert counts[0] == counts[1] > 0
    else:
        assert 0 < counts[0] < counts[1]
"""
    )


def test_thresholds_keep_the_density_asked_for():
    q, k, _ = tensors(128 * 60, 128 * 60)
    chunk = Chunk(q, k, softmax_scale=SCALE)
    rules = {name: Rule.parse(name) for name in ("published", "p8.64.pub", "var.32.share")}
    thresholds = Thresholds(Selector(), rules)
    always, visible = chunk.always(CONFIG, 59), chunk.earlier | chunk.own
    thresholds.see(chunk, 0, visible & ~always)
    number = 4 * int(visible.sum())
    for name, threshold in thresholds.found(0.3, number).items():
        kept = ((block_scores(chunk, rules[name]) >= threshold) | always) & visible
        assert int(kept.sum()) / number == pytest.approx(0.3, abs=0.03)
    with pytest.raises(SystemExit, match="is always kept"):
        thresholds.found(0.01, number)


def test_rows_are_the_tasks_and_their_mean():
    samples = [{"task": task, "group": f"{task}/{n}"} for task in ("multi_key", "multi_value") for n in range(4)]
    result = {
        **dict.fromkeys(("date", "model", "gpu", "vllm", "torch", "commit", "check"), "-"),
        "tokens": 32000,
        "samples": samples,
        "answers": {
            "dense": {"density": 1.0, "scores": [1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5]},
            "p8.32.pub.c01": {"density": 0.17, "scores": [1, 0, 0, 0, 0.5, 0.5, 0.5, 1]},
        },
    }
    key, value, both = task_rows(result, "p8.32.pub.c01")
    assert [row["task"] for row in (key, value, both)] == ["multi_key", "multi_value", "multi-fact"]
    assert [both[name] for name in ("estimate", "rows", "rule", "candidates", "density")] == [
        "p8",
        32,
        "pub",
        0.01,
        0.17,
    ]
    assert [(row["n"], row["dense"], row["sparse"], row["change"]) for row in (key, value, both)] == [
        (4, 50, 25, -25), (4, 50, 62.5, 12.5), (8, 50, 43.75, -6.25),
    ]  # fmt: skip
    assert all(row["low"] <= row["change"] <= row["high"] for row in (key, value, both))
