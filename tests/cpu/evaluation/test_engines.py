"""Dense and sparse engines of one evaluation, with a stand-in for them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation import __main__ as evaluate
from evaluation import engine as evaluation_engine
from evaluation import text

ENGINE = """
import json, sys
job = json.load(open(sys.argv[1]))
if job["options"].get("fails"):
    sys.exit("it fails")
assert json.load(open(sys.argv[2])).keys() == {"samples", "texts"}
with open(sys.argv[3], "w") as result:
    what_ran = {"device": job["mode"] if job["options"].get("differs") else "one"}
    json.dump({"job": job["job"], "what_ran": what_ran, "settings": job["settings"]}, result)
with open(__file__ + ".runs", "a") as runs:
    print(job["mode"], file=runs)
"""
JOB = {"options": {}, "settings": [["alpha", 0.1]]}
PROMPTS = {"samples": [{"tokens": [1]}], "texts": [{"tokens": [3]}]}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    path = tmp_path / "engine.py"
    path.write_text(ENGINE)
    monkeypatch.setattr(evaluate, "ENGINE", path)
    return path


@pytest.mark.parametrize("parallel", [False, True])
def test_a_dense_run_of_the_same_prompts_is_not_repeated(engine, tmp_path, parallel):
    def run(job, prompts=PROMPTS, fresh=False):
        _, sparse = evaluate.run_both(job, prompts, tmp_path / "out.json", fresh, parallel)
        assert sparse["settings"] == job["settings"]
        runs = sorted(Path(f"{engine}.runs").read_text().split())
        Path(f"{engine}.runs").unlink()
        return runs

    both = ["dense", "sparse"]
    assert run(JOB) == both
    other = {"settings": [], "target_density": 0.3, "calibration": [[5]], "options": {"min_sparse_tokens": 0}}
    assert run({**JOB, **other}) == ["sparse"]
    fewer = {**PROMPTS, "texts": []}
    assert run(JOB, fewer) == both
    assert run(JOB, fewer, fresh=True) == both
    assert run(JOB, fewer) == ["sparse"]


def test_an_engine_that_fails_is_an_error(engine, tmp_path):
    evaluate.run_both(JOB, PROMPTS, tmp_path / "out.json", False, False)
    with pytest.raises(SystemExit, match="the sparse run failed"):
        evaluate.run_both({**JOB, "options": {"fails": True}}, PROMPTS, tmp_path / "out.json", False, True)


def test_engines_that_differ_are_not_compared(engine, tmp_path):
    with pytest.raises(SystemExit, match=r"dense ran as .*'dense'.*, sparse as .*'sparse'"):
        evaluate.run_both({**JOB, "options": {"differs": True}}, PROMPTS, tmp_path / "out.json", False, False)


def test_calibration_text_is_neither_the_facts_nor_the_test_text(tokenizer, maker, prose):
    made = evaluate.calibration_texts(tokenizer, 3000)
    assert [len(tokens) for tokens in made] == [3000] * 3
    for tokens in made:
        lines = [line.strip() for line in tokenizer.decode(tokens).splitlines() if len(line) > 60]
        assert lines and not any(line in prose or line in text.code() for line in lines)


def test_the_options_of_a_running_engine_change():
    from vllm_flashprefill.config import FlashPrefillConfig

    def owner():
        return SimpleNamespace(flashprefill_config=FlashPrefillConfig(num_sink_blocks=3))

    impl, builders = owner(), [owner(), SimpleNamespace()]
    layers = {"0": SimpleNamespace(impl=impl), "1": SimpleNamespace(impl=SimpleNamespace()), "2": SimpleNamespace()}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    groups = [[SimpleNamespace(metadata_builders=builders)]]
    for runner in (SimpleNamespace(attn_groups=groups), SimpleNamespace(attn_metadata_builders=builders)):
        worker = SimpleNamespace(vllm_config=config, model_runner=runner)
        assert evaluation_engine.configure(worker, {"alpha": 0.3}) == 2
        for changed in (impl, builders[0]):
            assert changed.flashprefill_config == FlashPrefillConfig(alpha=0.3, num_sink_blocks=3)


@pytest.mark.parametrize("name", ["alpha", "min_share"])
def test_the_value_of_a_density_is_found_by_bisection(name):
    engine = object.__new__(evaluation_engine.Engine)
    engine.job = {"calibration": [[1], [2]]}
    salts = []

    def counted(run):
        run()
        kept = round(1000 * (1 - engine.options[name] ** 0.5))
        return [], {"kept_blocks": kept, "visible_blocks": 1000}

    engine.use = lambda options: setattr(engine, "options", options)
    engine.counted = counted
    engine.generate = lambda texts: salts.extend(text["group"] for text in texts)
    found = engine.options_for(0.7, name)
    assert found[name] == pytest.approx(0.09, rel=0.05)
    assert found.get("min_share", 0) == (0 if name == "alpha" else found[name])
    assert len(salts) == len(set(salts)) > 2


def test_settings_of_one_engine(tmp_path, monkeypatch):
    from vllm_flashprefill.config import FlashPrefillConfig

    config = FlashPrefillConfig(alpha=0.02)
    used = []

    class Engine:
        llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=None))

        def __init__(self, job):
            pass

        def generate(self, prompts):
            pass

        def use(self, options):
            used.append(options)

        def run_all(self):
            return {}

        def options_for(self, density, name):
            return evaluation_engine.options_of(name, density)

    monkeypatch.setattr(evaluation_engine, "Engine", Engine)
    monkeypatch.setattr(evaluation_engine, "what_ran", lambda llm: {})
    monkeypatch.setattr(FlashPrefillConfig, "from_vllm", classmethod(lambda cls, _: config))

    def run(settings, density=None):
        used.clear()
        job = {"mode": "sparse", "job": "", "settings": settings, "target_density": density}
        job["target_options"] = ["alpha", "min_share"]
        (tmp_path / "job.json").write_text(json.dumps(job))
        (tmp_path / "prompts.json").write_text(json.dumps({"samples": [{"tokens": [1]}], "texts": []}))
        evaluation_engine.main(tmp_path / "job.json", tmp_path / "prompts.json", tmp_path / "result.json")
        found = json.loads((tmp_path / "result.json").read_text())["settings"]
        return [(setting["name"], setting["calibrated"], setting["config"]["alpha"]) for setting in found]

    # One setting, the model's own: nothing of the engine is changed.
    assert run([("alpha", None)]) == [("alpha 0.02", False, 0.02)]
    assert not used
    asked = [("alpha", 0.3), ("alpha", None), ("min_share", 0.001), ("alpha", 0.02)]
    assert run(asked) == [("alpha 0.3", False, 0.3), ("alpha 0.02", False, 0.02), ("min_share 0.001", False, 0.02)]
    assert used == [
        {"alpha": 0.3, "min_share": 0.0},
        {"alpha": 0.02, "min_share": 0.0},
        {"alpha": 0.02, "min_share": 0.001},
    ]
    assert run([("alpha", None)], 0.5) == [
        ("alpha 0.02", False, 0.02),
        ("alpha 0.5", True, 0.5),
        ("min_share 0.5", True, 0.02),
    ]
    assert used[0] == {"alpha": 0.02, "min_share": 0.0}
