import copy
import functools
import os
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

import transformers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipTextConfig,
    SiglipTextModel,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import generic

from vllm_flashprefill import PRESETS, FlashPrefillConfig, hf
from vllm_flashprefill.backend.routing import DenseReason
from vllm_flashprefill.config import PRESETS_BY_HEAD_SIZE
from vllm_flashprefill.reference import flash_prefill_ref

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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_a_checkpointed_model_are_sdpas(use_reentrant):
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    gradients, before = [], hf.stats()
    for name in ("flashprefill", "sdpa"):
        model = make_model(name).train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    done = hf.stats() - before
    assert (done.sparse_tokens, set(done.dense_tokens)) == (0, {"training"})
    for ours, sdpas in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, sdpas, **TOLERANCE)


def test_a_model_in_training_mode_is_dense_without_gradients_too():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    check_dense(Run(make_model("flashprefill").train(), prompt()), "training", 2 * LENGTH)


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
    out, weights = hf.flash_prefill_attention(
        Layer().eval(), q, k, torch.randn(1, 2, key_len, value_size), None, **arguments
    )
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


def make_mask(batch=1, query_len=300, context_len=100, device="cpu", reason=None):
    """A mask of a chunk in a cache with room for 50 tokens more, and what it says."""
    shape = (batch, 1, query_len, context_len + query_len + 50)
    dense = torch.arange(shape[3]) <= torch.arange(context_len, context_len + query_len)[:, None]
    return hf.CausalMask(shape, torch.device(device), context_len, reason), dense.expand(shape)


def attend_with(mask, query_len, key_len):
    """What is counted of a call; its result must be sdpa's with the mask that model code would see."""
    q, kv = torch.randn(1, 2, query_len, 16), torch.randn(1, 2, key_len, 16)
    before = hf.stats()
    out = hf.flash_prefill_attention(Layer().eval(), q, kv, kv, mask)[0]
    done = hf.stats() - before
    expected = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, attn_mask=mask.materialise())
    torch.testing.assert_close(out, expected.transpose(1, 2))
    return done.dense_tokens


READS = {
    "slice": lambda mask: mask[:, :, -2:, :7],
    "invert": lambda mask: ~mask,
    "and": lambda mask: torch.ones(mask.shape, dtype=torch.bool).triu() & mask,
    "to float": lambda mask: mask.to(torch.float32),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "where": lambda mask: torch.where(mask, 0.0, torch.finfo(torch.float32).min),
    "expand": lambda mask: mask.expand(-1, 3, -1, -1),
    "any": lambda mask: mask.any(dim=-1),
    "sdpa": lambda mask: torch.nn.functional.scaled_dot_product_attention(
        torch.ones(mask.shape[0], 2, 300, 8),
        *torch.arange(mask.shape[0] * 2 * 2 * 450 * 8.0).view(2, -1, 2, 450, 8),
        mask,
    ),
}
COPIES = {
    "clone": lambda mask: mask.clone(),
    "detach": lambda mask: mask.detach(),
    "deepcopy": copy.deepcopy,
    "to the same device": lambda mask: mask.to("cpu"),
    "to another and back": lambda mask: mask.to("meta").to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operation", READS)
def test_a_causal_mask_reads_as_what_it_says(operation, batch, grad_mode):
    with grad_mode():
        mask, dense = make_mask(batch)
        assert mask.shape == dense.shape and mask.dtype == torch.bool and not mask.was_read
        torch.testing.assert_close(READS[operation](mask), READS[operation](dense))
        assert mask.was_read


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("operation", COPIES)
def test_a_copy_of_a_causal_mask_is_another(operation, grad_mode):
    with grad_mode():
        mask, dense = make_mask(2)
        copied = COPIES[operation](mask)
        assert isinstance(copied, hf.CausalMask) and not mask.was_read and not copied.was_read
        assert (copied.shape, copied.device, copied.context_len) == (mask.shape, mask.device, 100)
        assert torch.equal(copied[:], dense) and copied.was_read
        if operation != "to another and back":
            assert torch.equal(COPIES[operation](copied)[:], dense) and COPIES[operation](copied).was_read


def test_a_causal_mask_is_made_where_it_was_moved():
    mask = make_mask()[0].to(device="meta")
    assert mask.device.type == "meta" and not mask.was_read
    assert mask[0].device.type == "meta"


def test_a_mask_that_model_code_reads_is_sdpas_and_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask = make_mask()[0]
    mask[:, :, -2:]
    assert attend_with(mask, 300, 450) == {"custom_mask": 300}


def test_a_mask_that_model_code_changes_is_sdpas_and_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask = make_mask()[0]
    mask[..., 100:, :50] = False
    assert not mask.materialise()[..., 100:, :50].any()
    assert attend_with(mask, 300, 450) == {"custom_mask": 300}


def test_a_causal_mask_holds_whatever_the_layer_says_of_itself():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask = hf.CausalMask((1, 1, 300, 300), torch.device("cpu"), 0, DenseReason.SLIDING_WINDOW)
    assert attend_with(mask, 300, 300) == {"sliding_window": 300}


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


def test_a_model_that_reads_its_mask_is_sdpas_and_dense():
    """On transformers 4 such as Doge, which adds a mask of its own."""
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    model = make_model("flashprefill")

    def narrow_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"][:, :, :, :LENGTH]}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(narrow_mask, with_kwargs=True)
    run = Run(model, prompt())
    check_dense(run, "custom_mask", 2 * LENGTH)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), prompt()).logits, **TOLERANCE)


def make_text_encoder(implementation):
    torch.manual_seed(0)
    config = SiglipTextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation=implementation,
    )  # fmt: skip
    return SiglipTextModel(config).eval()


@torch.no_grad()
def test_a_text_encoder_keeps_its_padding_mask():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    ids, mask = prompt(2, 64), torch.ones(2, 64, dtype=torch.long)
    mask[1, 20:] = 0
    states = [make_text_encoder(name)(ids, attention_mask=mask).last_hidden_state for name in ("flashprefill", "sdpa")]
    kept = mask.bool()
    torch.testing.assert_close(states[0][kept], states[1][kept], **TOLERANCE)
    whole = make_text_encoder("sdpa")(ids).last_hidden_state
    assert (states[1] - whole)[kept].abs().max() > 0.01


def test_no_config_has_a_name_with_flash_in_it():
    early = LlamaConfig(**SHAPE, attn_implementation="flashprefill")
    hf.register()
    models = [
        LlamaForCausalLM(early),
        LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="flashprefill")),
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="flashprefill"),
        make_model("flashprefill"),
        make_model({"": "flashprefill"}),
        make_model(hf.CONFIG_NAME),
    ]
    for model in models:
        assert model.config._attn_implementation == model.model.config._attn_implementation == hf.CONFIG_NAME
    vision_and_text = SiglipConfig()
    vision_and_text._attn_implementation = {"text_config": "flashprefill", "vision_config": "sdpa"}
    assert vision_and_text.text_config._attn_implementation == hf.CONFIG_NAME
    assert vision_and_text.vision_config._attn_implementation == "sdpa"
    assert "flash" not in hf.CONFIG_NAME


@pytest.mark.parametrize("name", ["flashprefill", hf.CONFIG_NAME])
def test_a_config_that_refuses_flash_attention_takes_our_names(name):
    config_class = getattr(transformers, "HrmTextConfig", None)
    if config_class is None:
        pytest.skip("this transformers has no HRM")
    hf.register()
    config = config_class(attn_implementation=name)
    assert config.prefix_lm and not generic.is_flash_attention_requested(config)
    with pytest.raises(ValueError, match="FlashAttention"):
        config_class(attn_implementation="flash_attention_2")


def test_each_source_of_options_wins_over_the_next(monkeypatch):
    hf.register()
    assert hf.attention.layer_config("llama", 128).alpha == PRESETS["llama"]["alpha"]
    assert hf.attention.layer_config("qwen2_5_vl_text", 128).alpha == PRESETS["qwen2_5_vl"]["alpha"]
    assert hf.attention.layer_config("llama", 64).alpha == PRESETS_BY_HEAD_SIZE[64]["llama"]["alpha"]
    assert hf.attention.layer_config("llama", 96) == FlashPrefillConfig()
    hf.unregister()
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf.attention.layer_config("llama", 128).alpha == 0.3
    hf.unregister()
    monkeypatch.setenv("FLASHPREFILL_ALPHA", "0.2")
    hf.register(alpha=0.3, num_sink_blocks=5)
    assert hf.attention.layer_config("llama", 128) == FlashPrefillConfig(alpha=0.2, num_sink_blocks=5)


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
    def state():
        check = getattr(generic, "is_flash_attention_requested", None)
        return (
            sorted(AttentionInterface()),
            sorted(AttentionMaskInterface()),
            check,
            PretrainedConfig._attn_implementation,
        )

    before = state()
    hf.register()
    for name in ("flashprefill", hf.CONFIG_NAME):
        assert name in AttentionInterface() and name in AttentionMaskInterface()
        if before[2] is not None:
            assert not generic.is_flash_attention_requested(requested_attention_implementation=name)
            assert generic.is_flash_attention_requested(requested_attention_implementation="flash_attention_2")
    hf.unregister()
    assert state() == before
    with pytest.raises(ValueError, match="not supported"):
        make_model("flashprefill")


@pytest.mark.parametrize("owner", [PretrainedConfig, generic])
def test_a_transformers_without_what_is_replaced_is_one_clear_error(owner, monkeypatch):
    name = "_attn_implementation" if owner is PretrainedConfig else "is_flash_attention_requested"
    if not hasattr(owner, name):
        pytest.skip("transformers 4 has no such function and needs none")
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"transformers [\d.]+ has no \S+\.{name} for flashprefill to extend"):
        hf.register()
    assert "flashprefill" not in AttentionInterface()


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
