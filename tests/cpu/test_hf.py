import copy
import functools
import os
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

from transformers import (
    AttentionInterface,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vllm_flashprefill import PRESETS, FlashPrefillConfig, hf
from vllm_flashprefill.config import PRESETS_BY_HEAD_SIZE
from vllm_flashprefill.reference import flash_prefill_ref
from vllm_flashprefill.routing import DenseReason

# Prunes wherever it may, so that a wrong mask, scale or position shows.
EAGER_TO_PRUNE = dict(min_sparse_tokens=0, num_sink_blocks=1, num_window_blocks=1, num_dense_tail_blocks=0)
SHAPE = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    initializer_range=0.5,
    bos_token_id=1,
    eos_token_id=99,
    pad_token_id=0,
)
LENGTH = 700
TOLERANCE = dict(rtol=1e-3, atol=2e-3)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FLASHPREFILL_")]:
        monkeypatch.delenv(name)
    yield
    hf.unregister()


@functools.cache
def weights(model_class, config_class, options=()):
    torch.manual_seed(0)
    return model_class(config_class(**SHAPE, **dict(options))).eval()


def make_model(implementation, model_class=LlamaForCausalLM, config_class=LlamaConfig, **options):
    model = copy.deepcopy(weights(model_class, config_class, tuple(options.items())))
    model.set_attn_implementation(implementation)
    return model


def prompt(batch=1, length=LENGTH):
    return torch.randint(2, 98, (batch, length), generator=torch.Generator().manual_seed(1))


class Run:
    """The logits of one forward, and what was counted meanwhile."""

    @torch.no_grad()
    def __init__(self, model, ids, **arguments):
        before = hf.stats()
        self.logits = model(ids, **arguments).logits
        self.stats = hf.stats() - before


def num_pruned(stats):
    return stats.visible_blocks - stats.kept_blocks


def generate(model, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)


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


@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_is_the_reference(batch):
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    ids = prompt(batch)
    run = Run(make_model("flashprefill"), ids)
    assert 0.2 < run.stats.density < 0.9
    assert (run.logits - Run(make_model("sdpa"), ids).logits).abs().max() > 0.1

    config = FlashPrefillConfig(alpha=0.6, **EAGER_TO_PRUNE)
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
    hf.register(alpha=1.0, **{**EAGER_TO_PRUNE, "num_dense_tail_blocks": 1})
    model, ids = make_model("flashprefill"), prompt()
    with torch.no_grad():
        cache = model(ids[:, :512]).past_key_values
        before = hf.stats()
        model(ids[:, 512:640], past_key_values=cache)
        done = hf.stats() - before
    assert done.dense_tokens == {"nothing_to_prune": 2 * 128}


def check_dense(run, reason, tokens, sparse=0):
    assert run.stats.dense_tokens == {reason: tokens}
    assert run.stats.sparse_tokens == sparse


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dense(side):
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    ids, mask = prompt(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(60) if side == "left" else slice(-60, None)] = 0
    run = Run(make_model("flashprefill"), ids, attention_mask=mask)
    check_dense(run, "padding", 2 * 2 * LENGTH)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), ids, attention_mask=mask).logits)
    before = hf.stats()
    tokens = generate(make_model("flashprefill"), ids, attention_mask=mask)
    assert set((hf.stats() - before).dense_tokens) == {"padding", "decode"}
    assert torch.equal(tokens, generate(make_model("sdpa"), ids, attention_mask=mask))


def test_short_prompts_are_dense():
    hf.register(alpha=1.0)
    run = Run(make_model("flashprefill"), prompt())
    check_dense(run, "short_prompt", 2 * LENGTH)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), prompt()).logits)


def test_short_prompts_in_a_preallocated_cache_are_dense():
    hf.register(alpha=1.0, min_sparse_tokens=LENGTH + 1)
    before = hf.stats()
    tokens = generate(make_model("flashprefill"), prompt(), cache_implementation="static")
    assert (hf.stats() - before).dense_tokens["short_prompt"] == 2 * LENGTH
    assert torch.equal(tokens, generate(make_model("sdpa"), prompt(), cache_implementation="static"))


@pytest.mark.parametrize("window", [256, 4096])
def test_sliding_window_layers_are_dense(window):
    """One full layer, one with a window that is shorter, or longer, than the prompt."""
    hf.register(alpha=0.0, **EAGER_TO_PRUNE)
    options = dict(use_sliding_window=True, sliding_window=window, max_window_layers=1)
    runs = [
        Run(make_model(name, Qwen2ForCausalLM, Qwen2Config, **options), prompt()) for name in ("flashprefill", "sdpa")
    ]
    check_dense(runs[0], "sliding_window", LENGTH, sparse=LENGTH)
    torch.testing.assert_close(runs[0].logits, runs[1].logits, **TOLERANCE)


def test_first_layers_are_dense():
    hf.register(alpha=1.0, num_dense_layers=1, **EAGER_TO_PRUNE)
    check_dense(Run(make_model("flashprefill"), prompt()), "dense_layer", LENGTH, sparse=LENGTH)


def test_a_mask_of_ones_and_zeros_is_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[..., 300:, :100] = False
    run = Run(make_model("flashprefill"), prompt(), attention_mask=mask)
    check_dense(run, "custom_mask", 2 * LENGTH)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), prompt(), attention_mask=mask).logits)


def test_packed_prompts_are_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    positions = torch.cat([torch.arange(400), torch.arange(LENGTH - 400)])[None]
    run = Run(make_model("flashprefill"), prompt(), position_ids=positions, use_cache=False)
    check_dense(run, "custom_mask", 2 * LENGTH)
    dense = Run(make_model("sdpa"), prompt(), position_ids=positions, use_cache=False)
    torch.testing.assert_close(run.logits, dense.logits)


def test_training_is_dense_and_has_gradients():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    model = make_model("flashprefill")
    before = hf.stats()
    model(prompt(), labels=prompt()).loss.backward()
    assert (hf.stats() - before).dense_tokens == {"training": 2 * LENGTH}
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


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


class Layer(torch.nn.Module):
    is_causal = False


def attend(query_len, key_len, value_size=16, **arguments):
    q, k = torch.randn(1, 2, query_len, 16), torch.randn(1, 2, key_len, 16)
    before = hf.stats()
    out, weights = hf.flash_prefill_attention(Layer(), q, k, torch.randn(1, 2, key_len, value_size), None, **arguments)
    assert out.shape == (1, query_len, 2, value_size) and weights is None
    return (hf.stats() - before).dense_tokens


def test_what_is_not_plain_causal_attention_is_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    assert attend(300, 300) == {"encoder_attention": 300}
    assert attend(300, 200) == {"cross_attention": 300}
    assert attend(300, 300, is_causal=True) == {}
    assert attend(300, 300, value_size=8, is_causal=True) == {"head_size": 300}
    assert attend(300, 300, dropout=0.1, is_causal=True) == {"training": 300}
    assert attend(300, 200, is_causal=True) == {"custom_mask": 300}


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_what_sdpa_cannot_compute_is_an_error(argument):
    hf.register()
    with pytest.raises(ValueError, match=r"flashprefill: Layer has .* which transformers' sdpa does not compute"):
        attend(10, 10, **{argument: torch.ones(2)})


def test_arguments_meant_for_flash_attention_are_an_error():
    hf.register()
    with pytest.raises(ValueError, match="packed sequences or a mask of tokens"):
        attend(10, 10, cu_seq_lens_q=torch.tensor([0, 4, 10]))


def test_a_mask_that_model_code_reads_is_sdpas_and_dense():
    def make():
        return torch.ones(1, 1, 300, 400, dtype=torch.bool).tril(100)

    mask = hf.CausalMask((1, 1, 300, 400), torch.device("cpu"), make, 100, None)
    assert mask.shape == (1, 1, 300, 400) and mask.dtype == torch.bool and mask.to("cpu") is mask
    assert not mask.was_read
    assert torch.equal(mask[:, :, -2:], make()[:, :, -2:])
    assert mask.was_read
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    q, kv = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 400, 16)
    before = hf.stats()
    out = hf.flash_prefill_attention(Layer(), q, kv, kv, mask)[0]
    assert (hf.stats() - before).dense_tokens == {"custom_mask": 300}
    expected = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=make())
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_causal_mask_holds_whatever_the_layer_says_of_itself():
    def make():
        return torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()

    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask = hf.CausalMask((1, 1, 300, 300), torch.device("cpu"), make, 0, DenseReason.SLIDING_WINDOW)
    q = torch.randn(1, 2, 300, 16)
    before = hf.stats()
    out = hf.flash_prefill_attention(Layer(), q, q, q, mask)[0]
    assert (hf.stats() - before).dense_tokens == {"sliding_window": 300}
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_each_source_of_options_wins_over_the_next(monkeypatch):
    hf.register()
    assert hf._config("llama", 128).alpha == PRESETS["llama"]["alpha"]
    assert hf._config("qwen2_5_vl_text", 128).alpha == PRESETS["qwen2_5_vl"]["alpha"]
    assert hf._config("llama", 64).alpha == PRESETS_BY_HEAD_SIZE[64]["llama"]["alpha"]
    assert hf._config("llama", 96) == FlashPrefillConfig()
    hf.unregister()
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf._config("llama", 128).alpha == 0.3
    hf.unregister()
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "0.2")
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf._config("llama", 128) == FlashPrefillConfig(alpha=0.2, num_sink_blocks=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a number in"),
        ({"alhpa": 0.1}, "unknown option 'alhpa'; did you mean alpha?"),
        ({"num_window_blocks": 0}, "num_window_blocks must be an integer of at least 1"),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    with pytest.raises(ValueError) as error:
        hf.register(**options)
    assert message in str(error.value)
    assert "flashprefill" not in AttentionInterface().valid_keys()


def test_bad_variables_are_one_clear_error(monkeypatch):
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "much")
    with pytest.raises(ValueError, match="FLASHPREFILL_ALPHA must be a number"):
        hf.register()


def test_registering_twice():
    hf.register(alpha=0.1)
    hf.register(alpha=0.1)
    with pytest.raises(RuntimeError, match=r"already registered .* \{'alpha': 0.1\}; call .*unregister\(\)"):
        hf.register(alpha=0.2)
    hf.unregister()
    hf.unregister()
    hf.register(alpha=0.2)


def test_unregister_leaves_transformers_as_it_was():
    from transformers.utils import generic

    def state():
        check = getattr(generic, "is_flash_attention_requested", None)
        return sorted(AttentionInterface()), sorted(AttentionMaskInterface()), check

    before = state()
    hf.register()
    assert "flashprefill" in AttentionInterface() and "flashprefill" in AttentionMaskInterface()
    if before[2] is not None:
        assert not generic.is_flash_attention_requested(requested_attention_implementation="flashprefill")
        assert generic.is_flash_attention_requested(requested_attention_implementation="flash_attention_2")
    hf.unregister()
    assert state() == before
    with pytest.raises(ValueError, match="not supported"):
        make_model("flashprefill")


def test_transformers_missing_or_too_old_is_one_clear_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "4.55.0")
        with pytest.raises(RuntimeError, match=r"needs transformers 4\.56 or newer, not 4\.55\.0"):
            hf.register()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(RuntimeError, match=r"needs transformers 4\.56 or newer, which cannot be imported"):
            hf.register()
    hf.register()
