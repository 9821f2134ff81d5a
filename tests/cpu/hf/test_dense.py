"""What is dense, and counted by its reason, or an error."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="4.56", reason="transformers 4.56 or newer is not installed")

from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support.hf_models import (
    EAGER_TO_PRUNE,
    LENGTH,
    TOLERANCE,
    Layer,
    Run,
    check_dense,
    generate,
    make_model,
    prompt,
)
from vllm_flashprefill import hf


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


def log_probabilities(model, ids):
    return model(ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_importance_ratios_of_a_policy_that_trains_are_1(grad_mode):
    """The old policy's log-probabilities, without gradients, are those of the training pass with equal weights."""
    hf.register(alpha=0.6, **EAGER_TO_PRUNE)
    model, ids = make_model("flashprefill").train(), prompt()
    with grad_mode():
        old = log_probabilities(model, ids)
    new = log_probabilities(model, ids)
    assert new.requires_grad
    torch.testing.assert_close((new.detach() - old.clone()).exp(), torch.ones_like(old), rtol=0, atol=1e-4)
    with grad_mode():
        reference = log_probabilities(model.eval(), ids)
    assert (((new.detach() - reference.clone()).exp() - 1).abs() > 0.01).any(), "in eval mode it is sparse"


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


@pytest.fixture
def failing(monkeypatch):
    """What the kernels raise after they have selected blocks, and the warnings that this led to."""

    def fail(*args, block_counts, **kwargs):
        block_counts += 1
        calls.append(error[0])
        raise error[0]

    calls, error, warnings = [], [], []
    monkeypatch.setattr(hf.attention, "_failed", set())
    monkeypatch.setattr(hf.attention, "flash_prefill", fail)
    monkeypatch.setattr(hf.attention.logger, "warning", lambda text, *values: warnings.append(text % values))
    return SimpleNamespace(error=error, calls=calls, warnings=warnings)


def test_heads_that_the_kernels_do_not_run_for_are_dense(failing):
    """As heads of 256 on a GPU that has 99 KiB of shared memory for a block."""
    errors = pytest.importorskip("triton.runtime.errors")
    failing.error.append(errors.OutOfResources(147456, 101376, "shared memory"))
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    for _ in range(2):
        run = Run(make_model("flashprefill"), prompt())
        check_dense(run, "kernel_failed", 2 * LENGTH)
        assert run.stats.visible_blocks == 0
        torch.testing.assert_close(run.logits, Run(make_model("sdpa"), prompt()).logits)
    assert len(failing.calls) == 1
    (warning,) = failing.warnings
    assert "heads of 16, torch.float32 on cpu" in warning and "shared memory" in warning


def test_other_errors_are_the_callers(failing):
    failing.error.append(torch.OutOfMemoryError("CUDA out of memory"))
    hf.register(alpha=1.0, **EAGER_TO_PRUNE)
    with pytest.raises(torch.OutOfMemoryError):
        Run(make_model("flashprefill"), prompt())
    assert not failing.warnings


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_what_sdpa_cannot_compute_is_an_error(argument):
    hf.register()
    with pytest.raises(ValueError, match=r"flashprefill: Layer has .* which transformers' sdpa does not compute"):
        attend(10, 10, **{argument: torch.ones(2)})


def test_arguments_meant_for_flash_attention_are_an_error():
    hf.register()
    with pytest.raises(ValueError, match="packed sequences or a mask of tokens"):
        attend(10, 10, cu_seq_lens_q=torch.tensor([0, 4, 10]))
