"""Weights that are changed and reloaded in a running engine: right tokens after it, and counters that go on."""

import pytest

import vllm_flashprefill
from tests.support.engines import BARE, EXACT, LAYERS, assert_same, engine, vllm_version

if vllm_version() != "0.12.0":
    pytest.skip("one version is enough", allow_module_level=True)

SPARSE = {"alpha": 0.3, **BARE, "num_sink_blocks": 1, "num_dense_tail_blocks": 1}
TOKENS = 1500


def halve(worker):
    """Another model, in the same tensors: half of what each layer's attention adds."""
    done = 0
    for name, weight in worker.model_runner.model.named_parameters():
        if name.endswith("input_layernorm.weight"):
            weight.data.mul_(0.5)
            done += 1
    return done


def reload(worker):
    worker.model_runner.reload_weights()


@pytest.mark.parametrize("options", [EXACT, SPARSE], ids=["alpha 0", "sparse"])
def test_weights_reloaded_in_place(options, few_layers, text_ids):
    batch = [(text_ids[:TOKENS], 8)]
    with engine(options, **few_layers) as generate:
        before, first = generate(batch)
        assert generate.llm.collective_rpc(halve) == [LAYERS]
        changed, _ = generate(batch)
        generate.llm.collective_rpc(reload)
        after, again = generate(batch)
        total = vllm_flashprefill.stats()
    assert changed[0]["logprobs"] != pytest.approx(before[0]["logprobs"], abs=2e-3)
    assert_same(after, before)
    assert again.sparse_tokens == first.sparse_tokens > 0
    assert again.kept_blocks == first.kept_blocks
    assert total.sparse_tokens >= 3 * first.sparse_tokens


def test_sleep_is_for_gpus(few_layers):
    """What vLLM says on a CPU; its sleeping frees GPU memory."""
    with pytest.raises(Exception, match="Sleep mode is not supported on current platform"):
        with engine(enable_sleep_mode=True, **few_layers):
            pass
