import json
import logging
import os
import re

import pytest

from tests.support import MODEL, ROOT
from tests.support.engines import ENVIRONMENT, LAYERS, SMALL_LAYERS

os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
for name in [name for name in os.environ if name.startswith("FLASHPREFILL")]:
    del os.environ[name]


@pytest.fixture(scope="module", autouse=True)
def no_dynamo():
    """Eager engines have torch compile a few helpers of the sampler all the same, in every process for 10 seconds.

    Not for the whole session: some of tests/cpu compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


@pytest.fixture(autouse=True)
def lines_reach_caplog(monkeypatch, caplog):
    """vLLM's logger keeps its lines to itself, and its API server has the root's handlers show errors alone."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING)


@pytest.fixture(scope="session", autouse=True)
def model():
    if not MODEL.exists():
        pytest.skip(f"no model in {MODEL.relative_to(ROOT)}: run scripts/fetch_model.py")


@pytest.fixture(scope="session")
def few_layers(model, tmp_path_factory):
    """Arguments for an engine of the model's first LAYERS layers, for tests to which all of them would only add time.

    These layers prune little.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("few_layers")
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        layers = {name: re.search(r"layers\.(\d+)\.", name) for name in weights.keys()}
        kept = [name for name, layer in layers.items() if layer is None or int(layer[1]) < LAYERS]
        save_file({name: weights.get_tensor(name) for name in kept}, folder / "model.safetensors", {"format": "pt"})
    return {"model": str(folder), "tokenizer": str(MODEL)}


@pytest.fixture(scope="session")
def small_model(model, tmp_path_factory):
    """Llama's shape with 4 query and 2 KV heads, and random weights with which attention is peaked and matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small_model")
    config = LlamaConfig(
        vocab_size=json.loads((MODEL / "config.json").read_text())["vocab_size"],
        hidden_size=256, intermediate_size=512, num_hidden_layers=SMALL_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    small = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if "self_attn" in name:
                weight *= 4
            elif "embed_tokens" in name or "lm_head" in name:
                weight *= 10
    small.save_pretrained(folder)
    return {"model": str(folder), "tokenizer": str(MODEL), "max_model_len": 4096}


@pytest.fixture(scope="session")
def tokenizer(model):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="session")
def text_ids(tokenizer):
    """Token ids of real text, some 100,000."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))).ids
