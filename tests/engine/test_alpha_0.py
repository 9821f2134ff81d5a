"""alpha 0 keeps every block: whatever the scheduler makes of a batch, the answers are dense attention's."""

import pytest
from conftest import EXACT, assert_same, engine

EDGES = [1, 127, 128, 129]
RAGGED = [200, 256, 300, 333, 411, 512, 600, 777]


@pytest.fixture(scope="module")
def requests(text_ids):
    """One long prompt alone; prompts at the edges of a block; eight ragged ones together; a mix to be chunked."""
    starts = iter(range(0, 100_000, 1777))

    def prompt(length):
        start = next(starts)
        return text_ids[start : start + length]

    decoding = [(prompt(40), 16), (prompt(90), 16)]
    return {
        "one": [(prompt(1300), 8)],
        "edges": [(prompt(n), 8) for n in EDGES],
        "ragged": [(prompt(n), 8) for n in RAGGED],
        "mixed": [*decoding, (prompt(2100), 4), (prompt(300), 4)],
    }


@pytest.fixture(scope="module")
def dense(requests):
    with engine() as generate:
        return {name: generate(batch)[0] for name, batch in requests.items()}


def test_one_prompt_edge_lengths_and_a_ragged_batch(requests, dense):
    with engine(EXACT) as generate:
        one, one_stats = generate(requests["one"])
        edges, edges_stats = generate(requests["edges"])
        ragged, ragged_stats = generate(requests["ragged"])
    assert_same(one, dense["one"])
    assert_same(edges, dense["edges"])
    assert_same(ragged, dense["ragged"])
    assert one_stats.sparse_tokens == 30 * 1300
    assert one_stats.density == 1.0
    assert edges_stats.sparse_tokens == 30 * 129  # the others have nothing to prune
    assert ragged_stats.sparse_tokens == 30 * sum(RAGGED)


@pytest.mark.parametrize("tokens_per_step", [512, 1000, 2048])
def test_chunks_while_other_requests_decode(requests, dense, tokens_per_step):
    with engine(EXACT, max_num_batched_tokens=tokens_per_step, enable_chunked_prefill=True) as generate:
        answers, stats = generate(requests["mixed"])
    assert_same(answers, dense["mixed"])
    assert stats.density == 1.0
    assert stats.dense_tokens["decode"] >= 30 * 2 * 15
    assert stats.sparse_tokens > 30 * 2300


def test_prefix_cache_hit(text_ids):
    shared = text_ids[20_000:20_700]
    first, second, third = ([*shared, *text_ids[a : a + 300]] for a in (40_000, 50_000, 60_000))
    with engine() as generate:
        expected = [generate([(prompt, 8)])[0][0] for prompt in (first, second, third)]
    # The second and third hit what the first left, and share pages with each other within one step.
    with engine(EXACT, enable_prefix_caching=True) as generate:
        assert_same(generate([(first, 8)])[0], expected[:1])
        answers, stats = generate([(second, 8), (third, 8), (second, 8)])
    assert_same(answers, [expected[1], expected[2], expected[1]])
    assert all(answer["cached"] >= 640 for answer in answers)
    assert stats.sparse_tokens > 0


def test_preemption_and_recompute(text_ids):
    prompts = [(text_ids[a : a + 620], 40) for a in (3_000, 9_000)]
    with engine() as generate:
        expected, _ = generate(prompts)

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
        max_num_batched_tokens=4096,
        disable_log_stats=False,
    ) as generate:
        before = preemptions()
        answers, stats = generate(prompts)
        assert preemptions() - before >= 1
    assert_same(answers, expected)
    assert stats.sparse_tokens > 30 * 3 * 600
