"""`python -m evaluation` from its arguments to its rows, with engines that know some answers."""

import json
import sys

import pytest

pytest.importorskip("transformers")

import transformers

from evaluation import __main__ as evaluate
from tests.support import ROOT
from tests.support.words import Words
from tools import rows

# Dense it writes every number, sparse none; a sparse one is told to end after ENDS_AFTER tasks.
ENGINE = """
import os, signal, sys
from types import SimpleNamespace
from evaluation import engine

class Engine(engine.Engine):
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=None))
    tasks_left = int(os.environ.get("ENDS_AFTER", -1))

    def __init__(self, job):
        self.job = job

    def generate(self, prompts):
        pass

    def use(self, options):
        pass

    def counted(self, run):
        if self.job["mode"] == "sparse":
            if self.tasks_left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            self.tasks_left -= 1
        return run(), {"seconds": 1.0, "kept_blocks": 1, "visible_blocks": 4}

    def answer(self, prompts):
        numbers = " ".join(map(str, range(10_000))) if self.job["mode"] == "dense" else ""
        return [{"text": numbers} for _ in prompts]

    def predict(self, texts):
        value = -1.0 if self.job["mode"] == "dense" else -1.01
        found = [[value] * (text["length"] - text["first"]) for text in texts]
        return [{"logprobs": values, "predicted": values} for values in found]

engine.Engine, engine.what_ran = Engine, lambda llm: {"vllm": "1.2", "device": "GPU", "dtype": "bfloat16"}
engine.main(*sys.argv[1:])
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.setattr(evaluate, "ENGINE", tmp_path / "engine.py")
    monkeypatch.setattr(evaluate.signal, "signal", lambda *_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Words())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COMMIT", "abc")
    # As the engine registers it.
    monkeypatch.setenv("FLASHPREFILL_MAX_DENSITY", "1")
    monkeypatch.setenv("FLASHPREFILL_MIN_APPEND_TOKENS", "0")

    def run(*arguments, ends_after=-1):
        monkeypatch.setenv("ENDS_AFTER", str(ends_after))
        out = ["--out", str(tmp_path / "result.json"), "--rows", str(tmp_path / "accuracy.csv")]
        monkeypatch.setattr(sys, "argv", ["evaluation", "--model", "folder/M", *arguments, *out])
        evaluate.main()
        return json.loads((tmp_path / "result.json").read_text())

    run.rows = lambda: rows.read_rows(tmp_path / "accuracy.csv")
    run.out = lambda: capsys.readouterr().out
    run.folder = tmp_path
    return run


def test_rows_of_two_settings_and_one_dense_run(run):
    tasks = ["multi_key", "multi_value", "multi_query", "variable_tracking", "single"]
    arguments = ["--lengths", "700", "--samples", "2", "--texts", "2", "--tasks", ",".join(tasks)]
    settings = ["--setting", "alpha=0.065", "--setting", "alpha=0.08,piece_size=0"]
    result = run(*arguments, *settings)
    assert result["complete"] and list(result["settings"]) == ["dense", "alpha 0.065", "alpha 0.08, piece_size 0"]
    found = {(row["task"], row["setting"]): row for row in run.rows()}
    assert len(found) == len(run.rows()) == 2 * (len(tasks) + 2)
    single, several, lost = (found[task, "alpha 0.065"] for task in ("single", "multi-fact", "perplexity"))
    ran = dict(model="M", vllm="1.2", gpu="GPU", commit="abc", tokens="700", density="0.25")
    assert ran.items() <= single.items() and ran.items() <= several.items()
    assert [single[name] for name in ("n", "dense", "sparse", "change", "low", "high")] == [
        "2", "100.0", "0.0", "-100.0", "-100.0", "-100.0"
    ]  # fmt: skip
    # Of the four tasks the names of variables are no numbers.
    assert (several["n"], several["dense"], several["sparse"]) == ("8", "75.0", "0.0")
    assert (lost["n"], lost["dense"], lost["change"]) == ("2", "2.718", "1.005")
    assert "-75.0 (-75.0 to -75.0)" in run.out()
    # Another setting takes the dense answers, and its rows are added.
    run(*arguments, "--alpha", "0.3")
    assert "dense: as in" in run.out()
    assert len(run.rows()) == 3 * (len(tasks) + 2)


def test_a_run_that_is_ended_reports_what_is_done(run):
    arguments = ["--lengths", "700", "--texts", "1", "--tasks", "single,multi_key", "--setting", "alpha=0.1"]
    with pytest.raises(SystemExit, match="ended early"):
        run(*arguments, ends_after=1)
    assert [row["task"] for row in run.rows()] == ["single"]
    result = json.loads((run.folder / "result.json").read_text())
    assert not result["complete"] and [list(row["answers"]) for row in result["samples"]] == [
        ["dense", "alpha 0.1"],
        ["dense"],
    ]
    assert run(*arguments, "--resume")["complete"]
    assert [row["task"] for row in run.rows()] == ["single", "multi_key", "perplexity"]


def write_rows(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_with_tasks_that_have_no_metric_runs_the_others(run, tmp_path):
    row = {"input": "How many?", "context": "x " * 50, "answers": ["12"], "all_classes": None}
    for name in ("gov_report", "lcc", "hotpotqa"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", {**row, "dataset": name})
    result = run("--data", str(tmp_path / "data"), "--lengths", "300", "--setting", "alpha=0.1")
    assert result["complete"] and [sample["task"] for sample in result["samples"]] == ["hotpotqa"]
    left_out = {"LongBench's 'gov_report'": ["gov_report.jsonl"], "LongBench's 'lcc'": ["lcc.jsonl"]}
    assert result["without_metric"] == left_out
    said = "LongBench's 'gov_report' (gov_report.jsonl); LongBench's 'lcc' (lcc.jsonl)"
    assert run.out().splitlines()[0] == f"no metric here, left out: {said}"


@pytest.mark.parametrize(
    "file, row, message",
    [
        ("lcc.jsonl", {"input": "x", "context": "y", "answers": ["z"]}, "there is nothing to run"),
        ("vt.jsonl", {"input": "x", "outputs": []}, "vt.jsonl, line 1: outputs: the list is empty"),
        ("nowhere", None, "nowhere: No such file or directory"),
    ],
)
def test_bad_data_is_one_line_before_a_model_loads(run, tmp_path, monkeypatch, file, row, message):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: pytest.fail("the model is loaded"))
    if row is not None:
        write_rows(tmp_path / "data" / file, row)
    with pytest.raises(SystemExit) as error:
        run("--data", str(tmp_path / "data" / file), "--lengths", "300")
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert "\n" not in str(error.value)
