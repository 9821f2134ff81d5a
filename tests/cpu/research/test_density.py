import csv
import sys

import pytest
import torch

from research import density
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.reference import select_blocks_ref

OPTIONS = {"alpha": 0.9, "piece_size": 0, "num_dense_tail_blocks": 1, "num_sink_blocks": 0, "num_window_blocks": 1}


def layer(seed, heads=2):
    torch.manual_seed(seed)
    q, k = torch.randn(1500, heads, 32), torch.randn(1500, 1, 32)
    return {"q": q, "k": k, "v": k, "softmax_scale": 2.0}


def test_it_is_that_of_all_layers_as_prompts_of_so_many_tokens():
    layers = {0: layer(0), 5: layer(1, heads=4)}
    config = FlashPrefillConfig(**OPTIONS)
    kept = 0
    for each in layers.values():
        q, k = each["q"][:1300], each["k"][:1300]
        kept += int(select_blocks_ref(q, k, context_len=0, prompt_len=1300, config=config, softmax_scale=2.0).sum())
    found = density.density(layers, 1300, config)
    assert found == pytest.approx(kept / (6 * 11 * 12 / 2), abs=0.005)
    assert found < 0.9 and density.density(layers, 1300, FlashPrefillConfig(alpha=0.0)) == 1


def test_its_rows(tmp_path, monkeypatch, capsys):
    torch.save({0: layer(0)}, tmp_path / "docs.pt")
    arguments = [str(tmp_path / "docs.pt"), "--model", "M", "--text", "docs", "--csv", str(tmp_path / "rows.csv")]
    monkeypatch.setattr(sys, "argv", ["density", *arguments, "--lengths", "900", "1500", "--options", '{"alpha": 0}'])
    density.main()
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["density"], row["heads"]) for row in rows] == [
        ("900", "1.0", "2/1 of 32"), ("1500", "1.0", "2/1 of 32"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["density", *arguments, "--lengths", "1501"])
    with pytest.raises(SystemExit):
        density.main()
    assert "has 1500 tokens" in capsys.readouterr().err
