"""What is said when an engine is configured, before a model loads."""

import json
import multiprocessing

import pytest

import vllm_flashprefill
from tests.support import MODEL
from tests.support.engines import engine_arguments
from tests.support.registered import VERSION
from vllm_flashprefill.patches import engine_checks


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Make an engine's config, with the model's own changed; the warnings that this led to."""

    def configure(options=None, model=None, **changes):
        from vllm.engine.arg_utils import EngineArgs

        config = {**json.loads((MODEL / "config.json").read_text()), **(model or {})}
        (tmp_path / "config.json").write_text(json.dumps(config))
        vllm_flashprefill.register(**(options or {}))
        warnings = []
        monkeypatch.setattr(engine_checks.logger, "warning", lambda text, *values: warnings.append(text % values))
        arguments = engine_arguments(**{"model": str(tmp_path), "tokenizer": str(MODEL), **changes})
        EngineArgs(**arguments).create_engine_config()
        return warnings

    yield configure
    vllm_flashprefill.revert()


not_0_10_0 = pytest.mark.skipif(VERSION == "0.10.0", reason="vLLM 0.10.0's CPU engine refuses it with its own error")
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 2048}


@pytest.mark.parametrize(
    "engine, says",
    [
        ({}, None),
        ({"options": {"num_dense_layers": 29}}, None),
        ({"options": {"num_dense_layers": 30}}, "num_dense_layers is 30; at most 29 leaves a layer to prune"),
        (
            {"max_model_len": 2048},
            "under 4096 tokens are dense, and sequences have at most 2048; lower min_sparse_tokens",
        ),
        ({"max_model_len": 2048, "options": {"min_sparse_tokens": 1024}}, None),
        pytest.param(
            {"model": MISTRAL}, "every layer has a sliding window of 2048 tokens; --disable", marks=not_0_10_0
        ),
        ({"options": {"alpha": 0.0}}, "alpha is 0"),
    ],
    ids=str,
)
def test_an_engine_that_can_prune_nothing_warns_once(engine, says, configure):
    warnings = configure(**engine)
    if says is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith("FlashPrefill prunes nothing in this engine: ") and says in warning


def test_one_of_several_api_servers_leaves_the_warning_to_their_parent(configure, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "name", "ApiServer_1")
    assert configure(max_model_len=2048) == []


@not_0_10_0
def test_an_fp8_cache_is_said(configure, monkeypatch):
    from vllm.platforms import current_platform

    # vLLM's CPU engines have none, and leave it out.
    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(lambda cls, config: None))
    (warning,) = configure(kv_cache_dtype="fp8")
    assert "the KV cache is fp8, which is sparse on Hopper GPUs; ask for --kv-cache-dtype bfloat16" in warning


@pytest.mark.parametrize("given", ["options", "additional_config"])
def test_products_in_e4m3_on_a_cpu_are_an_error_before_a_model_loads(given, configure):
    options = {"compute_dtype": "fp8"}
    with pytest.raises(ValueError, match=r'^flashprefill: compute_dtype "fp8" is for Hopper GPUs .* there is no GPU'):
        configure(**{given: options if given == "options" else {"flashprefill": options}})


@pytest.mark.parametrize("key", ["flash_prefill", "flashPrefill"])
def test_a_misspelt_key_is_an_error_before_a_model_loads(key, configure):
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean 'flashprefill'"):
        configure(additional_config={key: {"alpha": 0.1}})
