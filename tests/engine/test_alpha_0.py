"""alpha 0 keeps every block: whatever the scheduler makes of a batch, the answers are dense attention's."""

import pytest

from tests.support.engines import EXACT, LAYERS, assert_same, engine

EDGES = [1, 127, 128, 129]
RAGGED = [200, 256, 300, 333, 411, 512]


@pytest.fixture(scope="module")
def requests(text_ids):
    """Batches by name: what is in them, and how they are run."""
    starts = iter(range(0, 100_000, 1777))

    def prompt(length):
        start = next(starts)
        return text_ids[start : start + length]

    shared = prompt(700)
    first, second, third = ([*shared, *prompt(300)] for _ in range(3))
    return {
        "one": [(prompt(1300), 4)],
        "edges": [(prompt(n), 4) for n in EDGES],
        "ragged": [(prompt(n), 4) for n in RAGGED],
        "first": [(first, 4)],
        # They hit what the first left, and share pages with each other within one step.
        "hits": [(second, 4), (third, 4), (second, 4)],
        "chunked": [(prompt(40), 12), (prompt(90), 12), (prompt(2100), 4), (prompt(300), 4)],
        "preempted": [(prompt(630), 16), (prompt(630), 16)],
    }


@pytest.fixture(scope="module")
def dense(requests, few_layers):
    with engine(**few_layers) as generate:
        return {name: generate(batch)[0] for name, batch in requests.items()}


@pytest.fixture(scope="module")
def exact(requests, few_layers):
    """(answers, stats) by name, from one engine."""
    with engine(EXACT, enable_prefix_caching=True, **few_layers) as generate:
        return {name: generate(requests[name]) for name in ("one", "edges", "ragged", "first", "hits")}


def test_one_prompt_edge_lengths_and_a_ragged_batch(exact, dense):
    stats = {}
    for name in ("one", "edges", "ragged"):
        answers, stats[name] = exact[name]
        assert_same(answers, dense[name])
    assert stats["one"].sparse_tokens == LAYERS * 1300
    assert stats["one"].density == 1.0
    assert stats["edges"].sparse_tokens == LAYERS * 129  # the others have nothing to prune
    assert stats["ragged"].sparse_tokens == LAYERS * sum(RAGGED)


def test_prefix_cache_hit(exact, dense):
    assert_same(exact["first"][0], dense["first"])
    answers, stats = exact["hits"]
    assert_same(answers, dense["hits"])
    assert all(answer["cached"] >= 640 for answer in answers)
    assert stats.sparse_tokens > 0


@pytest.mark.parametrize("tokens_per_step", [512, 1000])
def test_chunks_while_other_requests_decode(requests, dense, few_layers, tokens_per_step):
    changes = {**few_layers, "max_num_batched_tokens": tokens_per_step, "enable_chunked_prefill": True}
    with engine(EXACT, **changes) as generate:
        answers, stats = generate(requests["chunked"])
    assert_same(answers, dense["chunked"])
    assert stats.density == 1.0
    assert stats.dense_tokens["decode"] >= LAYERS * 2 * 11
    assert stats.sparse_tokens > LAYERS * 2300


def test_preemption_and_recompute(requests, dense, few_layers):
    def preemptions():
        return sum(
            metric.value for metric in generate.llm.get_metrics() if metric.name.startswith("vllm:num_preemptions")
        )

    # Pages of 128 tokens (one of them vLLM's own) for both prompts, but not for what they grow to.
    with engine(
        EXACT,
        num_gpu_blocks_override=12,
        block_size=128,
        max_model_len=1024,
        disable_log_stats=False,
        **few_layers,
    ) as generate:
        before = preemptions()
        answers, stats = generate(requests["preempted"])
        assert preemptions() - before >= 1
    assert_same(answers, dense["preempted"])
    assert stats.sparse_tokens > LAYERS * 3 * 620
