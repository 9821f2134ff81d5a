"""Models whose layers are sparse."""

import functools

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

from transformers import AttentionInterface, CompileConfig, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.support.hf_models import EAGER_TO_PRUNE, LENGTH, TOLERANCE, Run, generate, make_model, prompt
from vllm_flashprefill import FlashPrefillConfig, hf
from vllm_flashprefill.reference import flash_prefill_ref


def num_pruned(stats):
    return stats.visible_blocks - stats.kept_blocks


@pytest.mark.parametrize("batch", [1, 2])
def test_alpha_0_is_sdpa(batch):
    hf.register(alpha=0.0, **EAGER_TO_PRUNE)
    ids = prompt(batch)
    run = Run(make_model("flashprefill"), ids)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), ids).logits, **TOLERANCE)
    assert run.stats.sparse_tokens == 2 * batch * LENGTH
    assert run.stats.density == 1.0
    assert run.stats.visible_blocks == 2 * batch * 4 * sum(range(1, 7))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 256}])
def test_generation_at_alpha_0_is_sdpas(options):
    hf.register(alpha=0.0, **EAGER_TO_PRUNE)
    ids = prompt()
    before = hf.stats()
    tokens = generate(make_model("flashprefill"), ids, **options)
    done = hf.stats() - before
    assert torch.equal(tokens, generate(make_model("sdpa"), ids, **options))
    # Nothing can be pruned of the first chunk; transformers 4 feeds the last token of a chunked prompt alone.
    first_chunk = options.get("prefill_chunk_size", 0)
    assert done.dense_tokens.get("nothing_to_prune", 0) == 2 * first_chunk
    assert done.dense_tokens.keys() <= {"decode", "nothing_to_prune"}
    assert done.sparse_tokens in (2 * (LENGTH - first_chunk), 2 * (LENGTH - first_chunk - 1))


def reference_attention(module, query, key, value, attention_mask, scaling, config, **kwargs):
    outs = [
        flash_prefill_ref(*(x[i].transpose(0, 1) for x in (query, key, value)), config=config, softmax_scale=scaling)
        for i in range(len(query))
    ]
    return torch.stack(outs), None


@pytest.mark.parametrize("batch, options", [(1, {}), (2, {}), (2, {"alpha": 1.0, "piece_size": 8})])
def test_sparse_is_the_reference(batch, options):
    options = dict(EAGER_TO_PRUNE, alpha=0.6) | options
    hf.register(**options)
    ids = prompt(batch)
    run = Run(make_model("flashprefill"), ids)
    assert 0.2 < run.stats.density < (1 if options["piece_size"] else 0.9)
    assert (run.logits - Run(make_model("sdpa"), ids).logits).abs().max() > 0.1

    config = FlashPrefillConfig(**options)
    AttentionInterface.register("reference", functools.partial(reference_attention, config=config))
    AttentionMaskInterface.register("reference", sdpa_mask)
    torch.testing.assert_close(run.logits, Run(make_model("reference"), ids).logits, **TOLERANCE)


@pytest.mark.parametrize("static", [False, True])
def test_aligned_chunks_are_one_pass(static):
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    model, ids = make_model("flashprefill"), prompt()
    whole = Run(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=900) if static else None
    logits, pruned = [], 0
    for start in range(0, LENGTH, 256):
        with torch.no_grad():
            before = hf.stats()
            position = torch.arange(start, min(start + 256, LENGTH))
            out = model(ids[:, position], past_key_values=cache, cache_position=position, use_cache=True)
            pruned += num_pruned(hf.stats() - before)
            cache = out.past_key_values
            logits.append(out.logits)
    assert pruned == num_pruned(whole.stats) > 20
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **TOLERANCE)


def test_a_chunk_in_the_middle_of_a_prompt_keeps_its_tail_dense():
    hf.register(alpha=1.0, **{**EAGER_TO_PRUNE, "num_dense_tail_blocks": 2})
    model, ids = make_model("flashprefill"), prompt()
    with torch.no_grad():
        cache = model(ids[:, :512]).past_key_values
        before = hf.stats()
        model(ids[:, 512:700], past_key_values=cache)
        done = hf.stats() - before
    assert done.dense_tokens == {"nothing_to_prune": 2 * 188}


def test_a_compiled_model_is_sparse_too():
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    model, ids = make_model("flashprefill"), prompt()
    plain = Run(model, ids)
    compiled = Run(torch.compile(model, backend="eager"), ids)
    assert compiled.stats == plain.stats
    torch.testing.assert_close(compiled.logits, plain.logits, **TOLERANCE)


def test_a_compiled_decode_is_sdpas_whole():
    """As `generate` does by itself on a GPU; without a graph break, and so without counting."""
    hf.register(alpha=0.0, **EAGER_TO_PRUNE)
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    before = hf.stats()
    tokens = generate(
        make_model("flashprefill"), prompt(), cache_implementation="static", compile_config=compile_config
    )
    done = hf.stats() - before
    assert (done.sparse_tokens, done.dense_tokens) == (2 * LENGTH, {})
    assert torch.equal(tokens, generate(make_model("sdpa"), prompt(), cache_implementation="static"))


@pytest.mark.parametrize("chunk", [LENGTH, 256])
def test_layers_on_two_devices_are_sparse(chunk):
    """The second layer's mask comes from another device, as device_map="auto" has it."""
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    masks = []

    def move_mask(module, args, kwargs):
        masks.append(kwargs["attention_mask"])
        return args, {**kwargs, "attention_mask": masks[-1].to("meta").to("cpu")}

    runs = []
    for hook in (None, move_mask):
        model, cache, logits, before = make_model("flashprefill"), None, [], hf.stats()
        if hook is not None:
            model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
        for ids in prompt().split(chunk, dim=1):
            with torch.no_grad():
                out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        runs.append((torch.cat(logits, dim=1), hf.stats() - before))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    assert runs[1][1] == runs[0][1]
    assert runs[1][1].sparse_tokens == 2 * (LENGTH if chunk == LENGTH else LENGTH - chunk)
    assert not any(mask.was_read for mask in masks)
