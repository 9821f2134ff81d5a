"""The demo: its lines of progress, and the picture it leaves behind."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scripts import generate, kept_blocks
from tests.support.hf_models import EAGER_TO_PRUNE, make_model, prompt
from vllm_flashprefill import FlashPrefillConfig

PROMPTS = [generate.Prompt([1] * length, 0.5, "7391") for length in (100, 200, 400)]


def test_what_is_left_is_estimated_from_the_last_prompt():
    answers = [generate.Answer("", 2.0), generate.Answer("", 5.0)]
    assert generate.estimate(PROMPTS, []) == "100 tokens"
    assert generate.estimate(PROMPTS, answers[:1]) == "200 tokens, about 4 s of 12 s that are left"
    assert generate.estimate(PROMPTS, answers) == "400 tokens, about 10 s"


def test_each_prompt_has_a_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    answer = SimpleNamespace(outputs=[SimpleNamespace(text=" 7391.\nmore")])
    readings = []
    answers = generate.generate(
        SimpleNamespace(generate=lambda *_, **__: [answer]), PROMPTS, "dense", lambda: readings.append(1)
    )
    assert [answer.text for answer in answers] == ["7391."] * 3 and len(readings) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"dense, prompt {n} of 3" for n in (1, 2, 3)]
    assert all(line.endswith(" s") for line in lines)


def test_blocks_that_are_kept_are_those_of_the_attention(monkeypatch):
    config = FlashPrefillConfig(alpha=0.3, **EAGER_TO_PRUNE)
    recorded = {}

    def load(name, attention, device):
        recorded["attention"] = ALL_ATTENTION_FUNCTIONS["measured"] = attention
        return make_model("measured")

    monkeypatch.setattr(kept_blocks, "load_weights", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kept = kept_blocks.kept_blocks("M", prompt()[0].tolist(), config)
    assert list(kept) == [(0, 0), (1, 3)]
    for mask in kept.values():
        assert mask.shape == (6, 6) and mask.diagonal().all() and not mask.triu(1).any()
    assert 0 < recorded["attention"].density < 1


def test_heads_are_of_layers_with_full_attention():
    plain = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9)
    assert kept_blocks.heads_to_show(plain) == {0: 0, 3: 3, 7: 6, 11: 0, 15: 3, 18: 6, 22: 0, 26: 3}
    assert min(kept_blocks.heads_to_show(plain, num_dense_layers=5)) == 5
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"] * 2, num_attention_heads=4)
    assert kept_blocks.heads_to_show(mixed) == {1: 0, 3: 3}


def test_the_picture_is_left_or_its_absence_is_explained(capsys, monkeypatch, tmp_path):
    config = FlashPrefillConfig(alpha=0.1)
    drawn = []
    monkeypatch.setattr(kept_blocks, "kept_blocks", lambda model, tokens, _: drawn.append(len(tokens)))
    monkeypatch.setattr(kept_blocks, "draw", lambda kept, title, file: drawn.append((title, file.name)))
    monkeypatch.setattr(kept_blocks, "can_draw", lambda: False)
    generate.leave_picture("models/M", PROMPTS, config, "kept.png")
    assert "-m pip install matplotlib`" in capsys.readouterr().out and not drawn
    monkeypatch.setattr(kept_blocks, "can_draw", lambda: True)
    generate.leave_picture("models/M", PROMPTS, config, "kept.png")
    assert drawn == [400, ("M, 400 tokens, alpha 0.1", "kept.png")]
    assert "Wrote kept.png" in capsys.readouterr().out
    generate.leave_picture("models/M", [], config, "kept.png")
    assert "no prompt up to 8,192 tokens was sparse" in capsys.readouterr().out


def test_a_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    kept_blocks.draw({(0, 0): mask, (1, 3): mask}, "M", tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "cpu, capability, dtype", [(True, "AVX2", "float32"), (True, "AVX512", "auto"), (False, "AVX2", "auto")]
)
def test_a_cpu_that_is_slow_in_bfloat16_gets_float32(cpu, capability, dtype, capsys, monkeypatch):
    platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert generate.quick_dtype() == dtype
    assert ("In float32" in capsys.readouterr().out) == (dtype == "float32")
