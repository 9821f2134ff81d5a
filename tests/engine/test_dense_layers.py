"""Layers that are not eligible take vLLM's own path, with its own result, and are counted by reason; others do not."""

import pytest
import torch

import vllm_flashprefill
from tests.support import MODEL
from tests.support.engine_job import answer
from tests.support.engines import assert_same, engine_arguments, free_engine, vllm_version
from tests.support.model_kinds import rename_experts

if vllm_version() == "0.10.0":
    pytest.skip(
        "the CPU engine of vLLM 0.10.0 runs no sliding-window or ALiBi layer in chunked prefill, nor pooling models",
        allow_module_level=True,
    )

OPTIONS = {"alpha": 1.0, "piece_size": 0, "min_sparse_tokens": 256, "num_sink_blocks": 1, "num_window_blocks": 1}
SHAPE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(1200)]


def gemma2():
    from transformers import Gemma2Config

    return Gemma2Config(
        **SHAPE,
        **HEADS,
        sliding_window=256,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=20.0,
        hidden_act="gelu_pytorch_tanh",
    )


def gemma3():
    from transformers import Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**SHAPE, **HEADS, sliding_window=256, query_pre_attn_scalar=32, layer_types=layers)


def gpt_oss():
    from transformers import GptOssConfig

    layers = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(**SHAPE, **HEADS, **experts, sliding_window=128, layer_types=layers)


def bloom():
    from transformers import BloomConfig

    return BloomConfig(vocab_size=512, hidden_size=128, n_layer=2, n_head=4)


def bert():
    from transformers import BertConfig

    return BertConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=2048)


@pytest.fixture
def folder(tmp_path):
    """Writes a model with random weights of ordinary scale; returns its folder."""

    def write(config):
        from transformers import AutoModel, AutoModelForCausalLM

        torch.manual_seed(0)
        auto = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                # As much as a thousand tokens.
                torch.nn.init.normal_(parameter, mean=7.0, std=2.0)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
        model.save_pretrained(tmp_path)
        if config.model_type == "gpt_oss":
            rename_experts(tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def run(folder, sparse, options=OPTIONS, **changes):
    from vllm import LLM

    if sparse:
        vllm_flashprefill.register(**options)
    # A pooling model asks for a tokenizer, whichever.
    tokenizer = {"tokenizer": str(MODEL)} if "runner" in changes else {"skip_tokenizer_init": True}
    llm = LLM(**engine_arguments(model=folder, max_model_len=2048, **tokenizer, **changes))
    try:
        if "runner" in changes:
            (output,) = llm.embed([{"prompt_token_ids": PROMPT}], use_tqdm=False)
            return output.outputs.embedding, vllm_flashprefill.stats()
        return answer(llm, [(PROMPT, 4)]), vllm_flashprefill.stats()
    finally:
        del llm
        free_engine()
        vllm_flashprefill.revert()


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (gemma2, {"sliding_window": 1203, "logits_soft_cap": 1203}),
        (bloom, {"alibi": 2 * 1203}),
    ],
)
def test_a_model_of_dense_layers_alone_is_vllms_own(config, reasons, folder):
    path = folder(config())
    expected, _ = run(path, sparse=False)
    answers, stats = run(path, sparse=True)
    assert_same(answers, expected, logprob_tolerance=1e-6)
    assert stats.sparse_tokens == 0
    assert stats.dense_tokens == reasons


def test_a_model_with_both_kinds_of_layers_is_sparse_in_the_full_ones(folder):
    path = folder(gemma3())
    _, stats = run(path, sparse=True)
    assert stats.dense_tokens == {"sliding_window": 1203, "decode": 3}
    assert stats.sparse_tokens == 1200
    assert stats.density < 0.9


@pytest.mark.skipif(
    vllm_version() in ("0.12.0", "0.24.0"), reason="vLLM's own CPU engine does not run gpt-oss in float32"
)
def test_layers_with_sinks_are_sparse(folder):
    path = folder(gpt_oss())
    expected, _ = run(path, sparse=False)
    answers, stats = run(path, sparse=True, options={**OPTIONS, "alpha": 0.0})
    assert_same(answers, expected)
    assert stats.dense_tokens == {"sliding_window": 1203, "decode": 3} and stats.sparse_tokens == 1200
    _, stats = run(path, sparse=True)
    assert stats.density < 0.9


def test_encoder_attention_is_vllms_own(folder):
    path = folder(bert())
    expected, _ = run(path, sparse=False, runner="pooling")
    embedding, stats = run(path, sparse=True, runner="pooling")
    assert embedding == pytest.approx(expected, abs=1e-6)
    assert stats.dense_tokens == {"encoder_attention": 2 * 1200}
