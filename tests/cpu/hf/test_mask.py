"""The mask that stands for causal attention, for whoever reads it."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

from transformers import SiglipTextConfig, SiglipTextModel

from tests.support.hf_models import EAGER_TO_PRUNE, LENGTH, TOLERANCE, Layer, Run, check_dense, make_model, prompt
from vllm_flashprefill import hf
from vllm_flashprefill.routing import DenseReason


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
    "alias": torch.ops.aten.alias,
    "to_copy": torch.ops.aten._to_copy,
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


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("operation", READS)
def test_a_mask_from_another_mode_reads_as_what_it_says(operation, grad_mode):
    mask, dense = make_mask()
    with grad_mode():
        torch.testing.assert_close(READS[operation](mask), READS[operation](dense))


def test_what_changes_an_alias_changes_the_mask():
    mask, _ = make_mask()
    torch.ops.aten.alias(mask)[..., 100:, :50] = False
    assert mask.was_read and not mask.materialise()[..., 100:, :50].any()


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


def test_a_few_tokens_after_others_may_be_drafts_and_are_dense():
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    mask, _ = make_mask(query_len=5, context_len=600)
    assert attend_with(mask, 5, 655) == {"decode": 5}


def test_a_model_that_reads_its_mask_is_sdpas_and_dense():
    """On transformers 4 such as Doge, which adds a mask of its own."""
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    model = make_model("flashprefill")

    def add_to_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] & torch.ones(LENGTH, dtype=torch.bool)}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(add_to_mask, with_kwargs=True)
    run = Run(model, prompt())
    check_dense(run, "custom_mask", 2 * LENGTH)
    torch.testing.assert_close(run.logits, Run(make_model("sdpa"), prompt()).logits, **TOLERANCE)


def test_a_model_that_cuts_its_mask_to_the_keys_it_has_is_sparse():
    """As code written for caches of fixed length does; the cut is the whole mask."""
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    model, plain = make_model("flashprefill"), Run(make_model("flashprefill"), prompt())

    def cut_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"][:, :, :, :LENGTH]}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(cut_mask, with_kwargs=True)
    run = Run(model, prompt())
    assert run.stats == plain.stats and run.stats.sparse_tokens == 2 * LENGTH
    torch.testing.assert_close(run.logits, plain.logits)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_layers_that_accelerate_keeps_on_disk_are_sparse(grad_mode, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    plain, model = Run(make_model("flashprefill"), prompt()), make_model("flashprefill")
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    before = hf.stats()
    with grad_mode():
        logits = model(prompt()).logits
    assert hf.stats() - before == plain.stats
    torch.testing.assert_close(logits, plain.logits)


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
