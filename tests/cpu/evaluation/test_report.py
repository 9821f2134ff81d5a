"""What is made of the results."""

import sys
from types import SimpleNamespace

import pytest

from evaluation import heatmap, report


def test_without_matplotlib_the_heat_map_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        heatmap.draw({"samples": []}, tmp_path / "map.png")


def test_the_heat_map_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"depth": depth, "length": length, "answers": {"dense": {"score": 1.0}, "alpha 0.1": {"score": depth}}}
        for depth in (0.1, 0.9)
        for length in (600, 900)
    ]
    heatmap.draw({"model": "M", "samples": rows[:3]}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def setting(name, samples=(), texts=(), kept=6):
    counts = [{"of": of, "length": 600, "kept_blocks": kept, "visible_blocks": 10} for of in ("samples", "texts")]
    config = None if name == "dense" else {"block_size": 128, "num_dense_tail_blocks": 2}
    answers = [{"text": text} for text in samples]
    return {"name": name, "config": config, "samples": answers, "texts": list(texts), "counts": counts}


def test_rows_and_sums():
    def sample(task, group, expected):
        return SimpleNamespace(
            task=task,
            length=600,
            depth=0.5,
            group=group,
            tokens=[1] * 600,
            expected=expected,
            metric="string_match_all",
            classes=[],
        )

    samples = [sample("single", "a", ["1"]), sample("single", "b", ["2"]), sample("many", "c", ["3", "4"])]
    settings = [setting("dense", "135"), setting("alpha 0.1", ["9", "2", "34"])]
    rows = report.sample_rows(samples, settings)
    assert [row["answers"]["dense"]["score"] for row in rows] == [1, 0, 0]
    (line,) = report.length_rows(rows, settings)
    assert (line["setting"], line["density"], line["prompts"]) == ("alpha 0.1", 0.6, 3)
    # The mean over tasks: (0.5 + 0) / 2 and (0.5 + 1) / 2.
    assert (line["all"]["dense"], line["all"]["sparse"], line["all"]["difference"]) == (0.25, 0.75, 0.5)
    assert (line["all"]["lower"], line["all"]["higher"]) == (1, 2)
    assert line["all"]["interval"] == (0, 1)
    assert (line["single"]["dense"], line["single"]["difference"]) == (0.5, 0)
    single, many = report.summarise(rows)
    assert (single["dense"], many["dense"]) == (0.5, 0)
    assert single["sparse"]["alpha 0.1"] == {"score": 0.5, "lower": 1, "higher": 1, "same_text": 0}
    assert "(-1 +1)" in report.tables({"lengths": [line], "summary": [single, many], "predictions": []})


def test_an_interval_draws_clusters_within_strata():
    # One cluster of each stratum: nothing to draw.
    assert report.interval([(0, "a", 1), (0, "a", 0), (1, "b", 0)]) == (0.25, 0.25)
    few = report.interval([(0, n, n % 2) for n in range(10)])
    many = report.interval([(0, n, n % 2) for n in range(1000)])
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert many == pytest.approx((0.5 - 1.96 * 0.5 / 1000**0.5, 0.5 + 1.96 * 0.5 / 1000**0.5), abs=0.005)
    # A thousand values of ten clusters are as ten.
    assert report.interval([(0, n, n % 2) for n in range(10) for _ in range(100)]) == few


def test_predictions_are_split_where_the_dense_tail_begins():
    text = {"length": 600, "first": 300}
    # 600 tokens are 5 blocks; rows from 384 on are the tail, and predict tokens from 385 on.
    logprobs = [-1.0] * 85 + [-2.0] * 215
    run = {"logprobs": logprobs, "predicted": [0] * 300}
    other = {"logprobs": [-1.01] * 85 + [-2.0] * 215, "predicted": [0] * 299 + [1]}
    settings = [setting("dense", texts=[run]), setting("alpha 0.1", texts=[other], kept=5)]
    before, tail = report.prediction_rows([text], settings)
    assert (before["tokens"], tail["tokens"]) == (85, 215)
    assert before["dense_perplexity"] == pytest.approx(2.7183, abs=1e-4)
    assert (before["change"], tail["change"]) == (pytest.approx(0.01005, abs=1e-5), 0)
    assert (before["agreement"], tail["agreement"]) == (1, round(214 / 215, 4))
    assert tail["density"] == 0.5
    report.tables({"lengths": [], "summary": [], "predictions": [before, tail]})
