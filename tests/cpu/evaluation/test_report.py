"""What is made of the results."""

import sys
from types import SimpleNamespace

import pytest

from evaluation import heatmap, report

MADE = ("multi_key", "multi_value", "multi_query", "variable_tracking")
RULER = ("niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery", "vt")


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


def setting(name, samples=None, texts=None, kept=6, tasks=("single", "many")):
    counts = [
        {"of": of, "length": 600, "task": task, "kept_blocks": kept, "visible_blocks": 10}
        for of, task in [*(("samples", task) for task in tasks), ("texts", "texts")]
    ]
    config = None if name == "dense" else {"block_size": 128, "num_dense_tail_blocks": 2}
    made = {"name": name, "config": config, "counts": counts}
    if samples is not None:
        made["samples"] = [None if text is None else {"text": text} for text in samples]
    return made if texts is None else {**made, "texts": list(texts)}


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


def by_task(rows):
    return {(row["task"], row["setting"]): row for row in rows}


def test_rows_and_changes():
    samples = [sample("single", "a", ["1"]), sample("single", "b", ["2"]), sample("many", "c", ["3", "4"])]
    settings = [setting("dense", "135"), setting("alpha 0.1", ["9", "2", "34"])]
    settings[1]["counts"][1].update(kept_blocks=30, visible_blocks=40)
    rows = report.sample_rows(samples, settings)
    assert [row["answers"]["dense"]["score"] for row in rows] == [1, 0, 0]
    changes = by_task(report.change_rows(rows, settings))
    assert {task for task, _ in changes} == {"single", "many", "all"}
    line = changes["all", "alpha 0.1"]
    assert (line["density"], line["n"], line["tokens"]) == (36 / 50, 3, 600)
    # The mean over tasks: (0.5 + 0) / 2 and (0.5 + 1) / 2.
    assert (line["dense"], line["sparse"], line["change"]) == (25, 75, 50)
    assert (line["lower"], line["higher"]) == (1, 2)
    assert (line["low"], line["high"]) == (0, 100)
    single, many = changes["single", "alpha 0.1"], changes["many", "alpha 0.1"]
    assert (single["dense"], single["sparse"], single["change"], single["density"]) == (50, 50, 0, 0.6)
    assert (single["lower"], single["higher"], single["same_text"]) == (1, 1, 0)
    assert (many["dense"], many["change"], many["n"], many["density"]) == (0, 100, 1, 0.75)
    shown = report.tables({"changes": list(changes.values()), "predictions": []})
    assert "+50.0 (+0.0 to +100.0)" in shown


@pytest.mark.parametrize("tasks", [list(MADE), list(RULER)], ids=["made", "RULER"])
def test_tasks_of_several_facts_have_a_mean(tasks):
    samples = [sample(task, str(n), ["1"]) for n, task in enumerate(["single", *tasks])]
    right = [task.endswith("key_2") or task == tasks[0] for task in tasks]
    settings = [setting("dense", "1" * len(samples)), setting("alpha 0.1", ["1", *("01"[each] for each in right)])]
    found = by_task(report.change_rows(report.sample_rows(samples, settings), settings))
    assert found["multi-fact", "alpha 0.1"]["sparse"] == pytest.approx(100 * sum(right) / len(right))
    assert found["multi-fact", "alpha 0.1"]["n"] == len(tasks)
    fewer = report.change_rows(report.sample_rows(samples[:-1], settings), settings)
    assert "multi-fact" not in {row["task"] for row in fewer}


def test_what_is_not_answered_is_left_out():
    samples = [sample("single", "a", ["1"]), sample("single", "b", ["2"]), sample("many", "c", ["3"])]
    settings = [setting("dense", "123"), setting("alpha 0.1", ["1", "2", None]), setting("alpha 0.2")]
    rows = report.sample_rows(samples, settings)
    assert [list(row["answers"]) for row in rows] == [["dense", "alpha 0.1"]] * 2 + [["dense"]]
    assert list(by_task(report.change_rows(rows, settings))) == [("single", "alpha 0.1")]
    assert report.prediction_rows([{"length": 600, "first": 300}], settings) == []


def test_rows_for_results():
    samples = [sample("single", "a", ["1"]), sample("single", "b", ["2"]), sample("many", "c", ["3"])]
    text = {"length": 600, "first": 300}
    dense, sparse = ({"logprobs": [value] * 300, "predicted": [0] * 300} for value in (-1.0, -1.02))
    settings = [setting("dense", "123", [dense]), setting("alpha 0.1", "193", [sparse], kept=5)]
    result = {"model": "M", "vllm": "1.2", "device": "GPU", "commit": "abc", "seed": 3}
    result["changes"] = report.change_rows(report.sample_rows(samples, settings), settings)
    result["predictions"] = report.prediction_rows([text], settings)
    single, many, perplexity = report.csv_rows(result)
    assert " ".join(single) == ("model vllm gpu commit tokens setting density task n dense sparse change low high seed")
    assert list(single.values())[:9] == ["M", "1.2", "GPU", "abc", 600, "alpha 0.1", 0.5, "single", 2]
    assert [single[name] for name in ("dense", "sparse", "change", "low", "high")] == [100, 50, -50, -100, 0]
    assert many["task"] == "many" and list(perplexity) == list(single)
    assert single["seed"] == "3" and report.csv_rows({**result, "seed": [1, 7]})[0]["seed"] == "1 7"
    assert (perplexity["task"], perplexity["n"], perplexity["dense"]) == ("perplexity", 1, 2.718)
    assert (perplexity["change"], perplexity["low"], perplexity["density"]) == (2.02, 2.02, 0.5)


def made_result(seed, answers, **other):
    """Two prompts of a task, a setting of its own beside the one that all have."""
    samples = [sample("single", "a", ["1"]), sample("single", "b", ["2"])]
    names = ("dense", "alpha 0.1", f"alpha 0.{seed}5")
    settings = [
        setting(name, texts, tasks=("single",)) for name, texts in zip(names, ("12", answers, "12"), strict=True)
    ]
    run = dict.fromkeys(("model", "vllm", "torch", "device", "dtype", "commit", "batched_tokens"), "x")
    return {
        **run, "complete": True, "seed": seed, "settings": {name: {"piece_size": 8} for name in names},
        "counts": {each["name"]: each["counts"] for each in settings},
        "samples": report.sample_rows(samples, settings), **other,
    }  # fmt: skip


def test_runs_of_other_seeds_are_pooled():
    pooled = report.pool([made_result(1, "12"), made_result(2, "19"), made_result(3, "99")])
    (line,) = by_task(pooled["changes"]).values()
    assert (line["task"], line["setting"], line["n"]) == ("single", "alpha 0.1", 6)
    assert (line["dense"], line["sparse"], line["lower"]) == (100, 50, 3)
    assert line["low"] < line["change"] < line["high"]
    assert len({row["group"] for row in pooled["samples"]}) == 6
    assert (pooled["seed"], pooled["complete"]) == ([1, 2, 3], True)
    one = by_task(report.pool([made_result(1, "12")])["changes"])
    assert line["density"] == one["single", "alpha 0.1"]["density"]
    assert not report.pool([made_result(1, "12"), made_result(2, "12", complete=False)])["complete"]


def test_unlike_runs_are_not_pooled():
    with pytest.raises(ValueError, match="commit differs: x, y"):
        report.pool([made_result(1, "12"), made_result(2, "12", commit="y")])
    other = made_result(2, "12")
    other["settings"]["alpha 0.1"] = {"piece_size": 0}
    with pytest.raises(ValueError, match=r"not the same options everywhere: alpha 0\.1"):
        report.pool([made_result(1, "12"), other])
    with pytest.raises(ValueError, match="one of them is pooled already"):
        report.pool([made_result(1, "12"), {**made_result(2, "12"), "seed": [3, 4]}])
    with pytest.raises(ValueError, match="the same seed twice has the same prompts: 1, 1"):
        report.pool([made_result(1, "12"), made_result(1, "12")])


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
    assert "before the tail" in report.tables({"changes": [], "predictions": [before, tail]})


def test_a_row_names_a_cache_that_was_asked_for():
    from evaluation.__main__ import model_words

    assert model_words("/models/Qwen-1.5B", {}) == model_words("/models/Qwen-1.5B", {"kv_cache_dtype": "auto"})
    assert model_words("/models/Qwen-1.5B", {"kv_cache_dtype": "fp8"}) == "Qwen-1.5B, fp8 KV cache"
