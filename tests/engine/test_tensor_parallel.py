"""Two ranks of tensor parallelism, each with half of the heads, answer and select as one rank does."""

import pytest

from tests.support.engines import BARE, SMALL_LAYERS, assert_same, engine, run_engine, vllm_version

if vllm_version() != "0.12.0":
    pytest.skip("one version's workers are enough, and 0.12.0's is the quickest", allow_module_level=True)

RANKS = 2
# Random weights make all blocks score alike.
SPARSE = {"alpha": 1.0, "piece_size": 0, **BARE, "num_sink_blocks": 1, "num_dense_tail_blocks": 1}


@pytest.fixture(scope="module")
def batches(text_ids):
    """One prompt, and a step of three that are cut into chunks beside decodes."""
    return [
        [(text_ids[:1500], 4)],
        [(text_ids[5000 + start : 5000 + start + length], 8) for start, length in ((0, 60), (100, 1900), (3000, 900))],
    ]


@pytest.fixture(scope="module")
def on_two_ranks(small_model, batches):
    """[(answers, stats) of each batch] at alpha 0 and sparse, from one engine."""
    # The engine core stays in one process with its client, so that it has all prompts when it makes up the first step;
    # the ranks are processes of their own. vLLM would bind each rank's threads to a NUMA node. The last lets an option
    # be changed in the ranks.
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }  # fmt: skip
    env |= {f"FLASHPREFILL_{name.upper()}": str(value) for name, value in SPARSE.items()}
    passes = [{"alpha": 0.0}, {"alpha": SPARSE["alpha"]}]
    results, _ = run_engine(batches, env=env, passes=passes, tensor_parallel_size=RANKS, **small_model)
    results = [(result["answers"], result["stats"]) for result in results]
    return results[: len(batches)], results[len(batches) :]


def test_alpha_0_on_two_ranks_gives_the_default_backends_tokens(small_model, batches, on_two_ranks):
    with engine(**small_model) as generate:
        expected = [generate(batch)[0] for batch in batches]
    results, _ = on_two_ranks
    for (answers, stats), other in zip(results, expected, strict=True):
        assert_same(answers, other)
        assert stats["kept_blocks"] == stats["visible_blocks"] > 0
    assert results[0][1]["sparse_tokens"] == RANKS * SMALL_LAYERS * 1500


def test_two_ranks_keep_the_blocks_that_one_keeps(small_model, batches, on_two_ranks):
    with engine(SPARSE, **small_model) as generate:
        expected = [generate(batch) for batch in batches]
    _, results = on_two_ranks
    for (answers, stats), (other, other_stats) in zip(results, expected, strict=True):
        # Each rank counts its own heads' blocks.
        assert stats["visible_blocks"] == other_stats.visible_blocks
        assert stats["kept_blocks"] == pytest.approx(other_stats.kept_blocks, rel=1e-2)
        # A block whose score is within rounding of the best may be another one, and then answers may differ.
        if stats["kept_blocks"] == other_stats.kept_blocks:
            assert_same(answers, other)
        assert stats["kept_blocks"] < 0.9 * stats["visible_blocks"]
        assert stats["sparse_tokens"] == RANKS * other_stats.sparse_tokens
