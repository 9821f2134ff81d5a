"""Two engines behind two API servers (`--data-parallel-size 2 --api-server-count 2`): right answers, right counters."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import MODEL, ROOT
from tests.support.engines import EXACT, SMALL_LAYERS, engine, environment, flashprefill_metrics, vllm_version
from tests.support.serving import served

if vllm_version() != "0.12.0":
    pytest.skip("one version is enough, and 0.12.0's engines are the quickest to start", allow_module_level=True)

LENGTHS = (1500, 1400, 700, 650)


@pytest.fixture(scope="module")
def prompts(text_ids):
    return [text_ids[2000 * n : 2000 * n + length] for n, length in enumerate(LENGTHS)]


def test_two_engines_behind_two_api_servers(small_model, prompts, tmp_path):
    with engine(EXACT, **small_model) as generate:
        expected = [answer["text"] for answer in generate([(prompt, 8) for prompt in prompts])[0]]
    options = {f"FLASHPREFILL_{name.upper()}": str(value) for name, value in EXACT.items()}
    env = environment(
        PYTHONPATH=str(ROOT), FLASHPREFILL="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
        VLLM_CPU_KVCACHE_SPACE="1", **options,
    )  # fmt: skip
    arguments = [
        "--tokenizer", str(MODEL), "--data-parallel-size", "2", "--api-server-count", "2", "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048", "--max-num-seqs", "16",
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    with served(small_model["model"], env, *arguments, log_file=tmp_path / "log") as server:
        # One engine has a prompt and the other has none, whose steps are then dummies.
        assert server.complete(prompts[0], 8) == expected[0]
        first = flashprefill_metrics(server.metrics())
        assert first["sparse_tokens_total"] == SMALL_LAYERS * LENGTHS[0]
        # Nothing of a dummy's is counted, not even as dense.
        assert first == {**first, 'dense_tokens_total{reason="decode"}': SMALL_LAYERS * 7}
        assert not [name for name in first if "reason" in name and "decode" not in name]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: server.complete(prompt, 8), prompts)) == expected
        # Whichever of the two servers answers.
        scrapes = [flashprefill_metrics(server.metrics()) for _ in range(8)]
    assert all(scrape == scrapes[0] for scrape in scrapes)
    assert scrapes[0]["sparse_tokens_total"] == SMALL_LAYERS * (LENGTHS[0] + sum(LENGTHS))
    assert scrapes[0]["kept_blocks_total"] == scrapes[0]["visible_blocks_total"] > 0
    assert scrapes[0]['dense_tokens_total{reason="decode"}'] == SMALL_LAYERS * 7 * 5
    assert "EngineCore_DP1" in server.log and "ApiServer_1" in server.log
