"""transformers' continuous batching takes its own implementations alone."""

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

import transformers
from transformers import GenerationConfig

from tests.support.hf_models import EAGER_TO_PRUNE, LENGTH, Layer, generate, make_model, prompt
from vllm_flashprefill import hf


def generate_batch(model):
    options = GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=99, pad_token_id=0, num_blocks=64, block_size=32,
        max_batch_tokens=512,
    )  # fmt: skip
    more = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        # What the other says of the cache is not read here, and without a size it is nine tenths of the memory.
        config = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
        more = {"continuous_batching_config": config}
    inputs = [prompt()[0].tolist()]
    (output,) = model.generate_batch(inputs, generation_config=options, progress_bar=False, **more).values()
    return output.generated_tokens


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has it on a GPU alone")
def test_what_works_instead_is_sdpa():
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    model = make_model("flashprefill")
    with pytest.raises(ValueError, match="Implementation sparse_prefill is not supported for continuous batching"):
        generate_batch(model)
    model.set_attn_implementation("sdpa")
    assert generate_batch(model) == generate(make_model("sdpa"), prompt())[0, LENGTH:].tolist()
    model.set_attn_implementation("flashprefill")
    before = hf.stats()
    with torch.no_grad():
        model(prompt())
    assert (hf.stats() - before).sparse_tokens == 2 * LENGTH


def test_its_cache_is_an_error_and_not_left_unread():
    """transformers 4 calls any implementation, with a cache that the implementation has to write and read."""
    hf.register()
    q, kv = torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
    with pytest.raises(ValueError, match=r'continuous batching .* model.set_attn_implementation\("sdpa_paged"\) first'):
        hf.flash_prefill_attention(Layer().eval(), q, kv, kv, None, cache=object())
