"""Prefill in one engine, decode in another: a KV connector carries the pages that a sparse prefill has written."""

import contextlib

import pytest

from tests.support.engines import BARE, EXACT, LAYERS, assert_same, engine, vllm_version

if vllm_version() != "0.12.0":
    pytest.skip("the connector is made for one version", allow_module_level=True)

SPARSE = {"alpha": 0.3, "piece_size": 0, **BARE, "num_sink_blocks": 1, "num_dense_tail_blocks": 1}
TOKENS = 1500
# Pages of 128: the consumer computes what follows the last whole one.
REST = TOKENS % 128


@contextlib.contextmanager
def connected(role, folder, options, model):
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="PageConnector",
        kv_connector_module_path="tests.support.page_connector",
        kv_role=role,
        kv_connector_extra_config={"shared_storage_path": str(folder)},
    )
    with engine(options, kv_transfer_config=transfer, block_size=128, **model) as generate:
        yield generate


@pytest.mark.parametrize("options", [EXACT, SPARSE], ids=["alpha 0", "sparse"])
def test_a_decode_in_another_engine_gives_the_same_tokens(options, few_layers, text_ids, tmp_path):
    batch = [(text_ids[:TOKENS], 8)]
    with engine(options, block_size=128, **few_layers) as generate:
        expected, one = generate(batch)
    with engine(None, block_size=128, **few_layers) as generate:
        dense, _ = generate(batch)
    with connected("kv_producer", tmp_path, options, few_layers) as generate:
        produced, there = generate([(batch[0][0], 1)])
    with connected("kv_consumer", tmp_path, options, few_layers) as generate:
        answers, here = generate(batch)

    assert produced[0]["tokens"] == expected[0]["tokens"][:1]
    assert there.sparse_tokens == one.sparse_tokens > 0
    assert there.kept_blocks == one.kept_blocks
    assert_same(answers, expected)
    # The consumer has whole pages from the producer, and computes what follows them.
    assert here.sparse_tokens + sum(here.dense_tokens.values()) == LAYERS * (REST + 7)
    if options is EXACT:
        assert_same(answers, dense)
    else:
        # That is the dense tail.
        assert here.sparse_tokens == 0
        assert there.density < 0.95


def test_cpu_offloading_is_for_gpus(few_layers):
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both",
        kv_connector_extra_config={"num_cpu_blocks": 100, "block_size": 128},
    )  # fmt: skip
    with pytest.raises(Exception, match="CPU Offloading is currently only supported on CUDA-alike GPUs"):
        with engine(kv_transfer_config=transfer, block_size=128, **few_layers):
            pass
