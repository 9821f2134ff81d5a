"""Calibration: the search, and a run on a small model of random weights with a text of its own."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from vllm_flashprefill import FlashPrefillConfig, calibrate
from vllm_flashprefill.real_model import Attention, dense_attention, encode_text, load_tokenizer


def curve(value):
    """A result that depends on a value as real ones do: density falls and loss grows with it."""
    density = 1 / (1 + (value / 0.02) ** 0.4)
    return calibrate.Result(density=density, loss=0.05 * (1 - density) ** 2, agreement=1.0, perplexity=1.0)


@pytest.mark.parametrize("density", [0.2, 0.46, 0.95])
def test_search_finds_a_density(density):
    value, result = calibrate.search(curve, 1e-5, 1.0, density=density, passes=12)
    assert abs(result.density - density) <= 0.005 and result == curve(value)


@pytest.mark.parametrize("loss", [0.001, 0.01])
def test_search_stays_under_a_loss(loss):
    _, result = calibrate.search(curve, 1e-5, 1.0, loss=loss, passes=12)
    assert 0.9 * loss <= result.loss <= loss


def test_search_takes_the_largest_value_within_a_loss_that_is_never_reached():
    value, _ = calibrate.search(curve, 1e-5, 1.0, loss=1.0, passes=12)
    assert value > 0.9


def test_search_says_what_it_came_to():
    with pytest.raises(SystemExit, match="not reached in 5 passes; the last one tried"):
        calibrate.search(curve, 1e-5, 1.0, density=0.01, passes=5)


@pytest.fixture
def model_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    picked = torch.randint(100, (2500,)).tolist()
    (tmp_path / "text").write_text(" ".join(f"w{n}" for n in picked))
    return tmp_path


# By pieces, with random weights, all candidates are kept.
@pytest.mark.parametrize("others, density", [({"piece_size": 0}, 0.88), ({"candidate_alpha": 0.5}, 0.91)], ids=str)
def test_a_preset_has_the_density_asked_for_and_loads(others, density, model_folder, monkeypatch, capsys):
    out = model_folder / "preset.json"
    arguments = ["--density", str(density), "--length", "2300", "--text", str(model_folder / "text"), "--last", "64"]
    others = {"num_dense_layers": 1, "min_sparse_tokens": 2048, **others}
    arguments += ["--options", json.dumps(others), "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(model_folder), *arguments])
    with torch.no_grad():
        calibrate.main()
    options = json.loads(out.read_text())["flashprefill"]
    config = FlashPrefillConfig.from_options(options)
    # Whatever the engine's variables say of pieces, alpha is for these.
    assert options == {"alpha": config.alpha, "piece_size": 8, **others} and config.num_dense_layers == 1
    vllm_config = SimpleNamespace(model_config=None, additional_config=json.loads(out.read_text()))
    assert FlashPrefillConfig.from_vllm(vllm_config, {}) == config
    text = calibrate.Text(str(model_folder), str(model_folder / "text"), 2300, last=64, end=2000, device="cpu")
    with torch.no_grad():
        assert text.measure(None).loss == 0
        result = text.measure(config)
    assert abs(result.density - density) <= 0.01 * density
    said = capsys.readouterr().out
    assert f"{result.density:.1%}" in said and "on the CPU: a pass takes about 00:0" in said


@pytest.mark.parametrize("spaces", [10, 14, 200])
def test_a_text_is_read_on_until_it_has_the_tokens(spaces, model_folder):
    """As wide columns, ruler lines or indented JSON have more characters a token than most texts."""
    words = [f"w{n % 100}" for n in range(3000)]
    wide = model_folder / "wide"
    wide.write_text((" " * spaces).join(words))
    tokenizer = load_tokenizer(str(model_folder))
    right = tokenizer.encode(wide.read_text(), add_special_tokens=False)
    assert len(right) == 3000
    for start, length in ((0, 10), (0, 2500), (700, 2300), (0, 2999), (0, 3000)):
        assert encode_text(tokenizer, str(wide), length, start) == right[start : start + length]
    with pytest.raises(SystemExit, match="wide: only 2990 tokens from 10 on, not 3000"):
        encode_text(tokenizer, str(wide), 3000, 10)


def test_a_short_text_is_said_before_the_model_loads(model_folder, monkeypatch):
    monkeypatch.setattr(calibrate, "load_weights", lambda *_: pytest.fail("the model is loaded"))
    arguments = ["--density", "0.5", "--length", "8000", "--text", str(model_folder / "text"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(model_folder), *arguments])
    with pytest.raises(SystemExit, match="only 2500 tokens"):
        calibrate.main()


def test_on_the_cpu_it_says_how_long_it_takes_and_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(calibrate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(calibrate, "LINE_SECONDS", 100)
    with calibrate.Progress(passes=13, parts=2, device="cpu") as progress:
        for _ in range(13 * 2):
            now[0] += 30
            progress.update()
    assert capsys.readouterr().out.splitlines() == [
        "on the CPU: a pass takes about 01:00, all 13 at most 13:00",
        "pass 4 of 13: at most 09:30 more",
        "pass 6 of 13: at most 07:30 more",
        "pass 8 of 13: at most 05:30 more",
        "pass 10 of 13: at most 03:30 more",
        "pass 12 of 13: at most 01:30 more",
    ]


def test_on_a_gpu_there_is_the_bar_alone(capsys):
    with calibrate.Progress(passes=2, parts=3, device="cuda") as progress:
        for _ in range(6):
            progress.update()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0.5", "--length", "1000"], "under 4096 tokens are dense"),
        (["--density", "0.5", "--options", '{"alpha": 0.1}'], "--options is for others than alpha"),
        (["--density", "0.5", "--options", '{"min_share": 0.1}'], "min_share is no option any more: "),
        (["--density", "0.5", "--options", '{"compute_dtype": "fp8"}'], "compute_dtype is for KV caches in e4m3"),
        (["--density", "0.5", "--options", '{"num_dense_layers": -1}'], "num_dense_layers must be an integer"),
        (["--density", "0.5", "--loss", "0.1"], "not allowed with"),
        (["--density", "0.5", "--last", "9000"], "fewer than --last 9000"),
        (["--density", "0.5", "--text", "no/such.txt"], "--text no/such.txt: No such file or directory"),
        (["--density", "0.5", "--text", "/"], "--text /: Is a directory"),
        (["--density", "0.5", "--out", "no/such.json"], "--out no/such.json: there is no such folder"),
        ([], "is required"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "nowhere", *arguments])
    with pytest.raises(SystemExit):
        calibrate.main()
    assert message in capsys.readouterr().err


def test_a_layer_with_a_sliding_window_stays_dense():
    q, k, v = (torch.randn(1, heads, 1500, 16) for heads in (2, 1, 1))
    attention = Attention(config=FlashPrefillConfig(alpha=1.0, piece_size=0))
    module = SimpleNamespace(layer_idx=0)
    out, _ = attention(module, q, k, v, None, 0.25, sliding_window=100)
    assert attention.density == 1.0
    tokens = torch.arange(1500)
    seen = (tokens <= tokens[:, None]) & (tokens > tokens[:, None] - 100)
    logits = (0.25 * q @ k.transpose(2, 3)).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, (logits.softmax(dim=-1) @ v).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert attention(module, q, k, v, None, 0.25)[0].shape == out.shape and attention.density < 1
    with pytest.raises(NotImplementedError, match="softcap"):
        dense_attention(q, k, v, 0.25, softcap=30.0)
