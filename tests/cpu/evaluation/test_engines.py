"""Dense and sparse engines of one evaluation, with a stand-in for them."""

import json
import signal
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from evaluation import __main__ as evaluate
from evaluation import engine as evaluation_engine
from evaluation import text

ENGINE = """
import json, os, signal, sys
job = json.load(open(sys.argv[1]))
with open(__file__ + ".runs", "a") as runs:
    print(job["mode"], file=runs)
if job["options"].get("fails"):
    sys.exit("it fails")
assert json.load(open(sys.argv[2])).keys() == {"samples", "texts"}
what_ran = {"device": job["mode"] if job["options"].get("differs") else "one"}
ends = job["options"].get("ends") == job["mode"]
result = {"job": job["job"], "what_ran": what_ran, "settings": job["settings"], "complete": not ends}
if os.path.exists(sys.argv[3]):
    result["earlier"] = json.load(open(sys.argv[3]))["settings"]
if job["options"].get("empty") != job["mode"]:
    with open(sys.argv[3], "w") as file:
        json.dump(result, file)
if ends:
    os.kill(os.getpid(), signal.SIGTERM)
"""
JOB = {"options": {}, "settings": [{"alpha": 0.1}], "commit": "a"}
PROMPTS = {"samples": [{"tokens": [1]}], "texts": [{"tokens": [3]}]}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    path = tmp_path / "engine.py"
    path.write_text(ENGINE)
    monkeypatch.setattr(evaluate, "ENGINE", path)
    return path


@pytest.fixture
def run(engine, tmp_path):
    def run(options=None, prompts=PROMPTS, parallel=False, **which):
        job = {**JOB, **(options or {})}
        try:
            return evaluate.run_both(job, prompts, tmp_path / "out.json", parallel, **which)
        finally:
            run.modes = sorted(Path(f"{engine}.runs").read_text().split())
            Path(f"{engine}.runs").unlink()

    return run


@pytest.mark.parametrize("parallel", [False, True])
def test_a_dense_run_of_the_same_prompts_is_not_repeated(run, parallel):
    def modes(options=None, prompts=PROMPTS, **which):
        _, sparse, whole = run(options, prompts, parallel, **which)
        assert whole and sparse["settings"] == (options or JOB).get("settings", JOB["settings"])
        assert "earlier" not in sparse
        return run.modes

    both = ["dense", "sparse"]
    assert modes() == both
    other = {"settings": [], "target_density": 0.3, "calibration": [[5]], "options": {"min_sparse_tokens": 0}}
    assert modes({**other, "commit": "b"}) == ["sparse"]
    fewer = {**PROMPTS, "texts": []}
    assert modes(prompts=fewer) == both
    assert modes(prompts=fewer, fresh=True) == both
    assert modes(prompts=fewer) == ["sparse"]


def test_a_run_that_is_ended_has_what_was_done_and_is_resumed(run):
    _, sparse, whole = run({"options": {"ends": "sparse"}})
    assert not whole and not sparse["complete"]
    more = {"settings": [{"alpha": 0.1}, {"alpha": 0.2}], "options": {"ends": "sparse"}}
    _, sparse, _ = run(more, resume=True)
    assert run.modes == ["sparse"] and sparse["earlier"] == JOB["settings"]
    # Another commit may do something else.
    _, sparse, _ = run({**more, "commit": "b"}, resume=True)
    assert "earlier" not in sparse
    # A dense run that has ended early goes on by itself.
    with pytest.raises(SystemExit, match="ended before both engines"):
        run({"options": {"ends": "dense"}}, fresh=True)
    dense, _, whole = run()
    assert whole and run.modes == ["dense", "sparse"] and dense["earlier"] == JOB["settings"]


def test_a_run_that_is_ended_before_any_answer_says_so(run):
    with pytest.raises(SystemExit, match="ended before both engines had answered"):
        run({"options": {"ends": "sparse", "empty": "sparse"}})


def test_an_engine_that_fails_is_an_error(run):
    run()
    with pytest.raises(SystemExit, match="the sparse run failed"):
        run({"options": {"fails": True}}, parallel=True)


def test_engines_that_differ_are_not_compared(run):
    with pytest.raises(SystemExit, match=r"dense ran as .*'dense'.*, sparse as .*'sparse'"):
        run({"options": {"differs": True}})


def test_told_to_end_twice_it_ends_once():
    before = signal.signal(signal.SIGTERM, evaluate.end)
    try:
        with pytest.raises(evaluate.Ended):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluation", *arguments])
    return evaluate.parse_arguments()


def test_settings_of_the_command_line(monkeypatch):
    assert parsed(monkeypatch).setting == [{}]
    assert parsed(monkeypatch, "--alpha", "default,0.02").setting == [{}, {"alpha": 0.02}]
    several = parsed(monkeypatch, "--setting", "alpha=0.08,piece_size=0", "--setting", "default", "--alpha", "0.1")
    assert several.setting == [{"alpha": 0.1}, {"alpha": 0.08, "piece_size": 0}, {}]
    assert parsed(monkeypatch, "--setting", "compute_dtype=fp8,alpha=0.1").setting == [
        {"compute_dtype": "fp8", "alpha": 0.1}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "piece_size=7"], "piece_size must be one of"),
        (["--setting", "alpha=2"], "alpha must be a number in [0, 1], not 2"),
        (["--setting", "alpha"], "'alpha' is not default, nor NAME=NUMBER"),
        (["--setting", "alpha=much"], "'alpha=much' is not default, nor NAME=NUMBER"),
        (["--setting", "compute_dtype=8"], "compute_dtype must be one of ('auto', 'fp8'), not '8'"),
        (["--setting", "min_share=0.1"], "min_share is no option any more"),
        (["--setting", "num_dense_layers=2"], "num_dense_layers is fixed while an engine runs"),
        (["--alpha", "0.1,alot"], "'alpha=alot' is not default"),
        (["--fresh", "--resume"], "--fresh or --resume"),
        (["--tasks", "single,other"], "unknown other"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


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


def test_the_alpha_of_a_density_is_found_by_bisection():
    engine = object.__new__(evaluation_engine.Engine)
    engine.job = {"calibration": [[1], [2]]}
    salts = []

    def counted(run):
        run()
        assert engine.options["piece_size"] == 0
        kept = round(1000 * (1 - engine.options["alpha"] ** 0.5))
        return [], {"kept_blocks": kept, "visible_blocks": 1000}

    engine.use = lambda options: setattr(engine, "options", options)
    engine.counted = counted
    engine.generate = lambda texts: salts.extend(text["group"] for text in texts)
    assert engine.alpha_for(0.7, {"alpha": 0.5, "piece_size": 0}) == pytest.approx(0.09, rel=0.05)
    assert len(salts) == len(set(salts)) > 2


def test_a_setting_is_named_by_alpha_and_what_is_not_the_packages():
    from vllm_flashprefill.config import FlashPrefillConfig

    assert evaluation_engine.setting_name(FlashPrefillConfig(), {}) == "alpha 0.73"
    config = FlashPrefillConfig(alpha=0.08, piece_size=0, num_sink_blocks=1)
    assert evaluation_engine.setting_name(config, {}) == "alpha 0.08, num_sink_blocks 1, piece_size 0"
    assert evaluation_engine.setting_name(config, {"num_sink_blocks": 1}) == "alpha 0.08, piece_size 0"
    assert evaluation_engine.setting_name(FlashPrefillConfig(), {"max_density": 1.0}) == "alpha 0.73, max_density 0.8"
    fp8 = FlashPrefillConfig(compute_dtype="fp8")
    assert evaluation_engine.setting_name(fp8, {}) == "alpha 0.73, compute_dtype fp8"


def engine_class(used):
    """An engine that answers with what it uses."""

    class Engine:
        llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=None))
        answered = 0

        def __init__(self, job):
            self.job, self.fails_at = job, job.get("fails_at")

        def generate(self, prompts):
            pass

        def use(self, options):
            used.append(options)

        def counted(self, run):
            return run(), {"seconds": 1.0, "kept_blocks": 1, "visible_blocks": 2}

        def answer(self, prompts):
            Engine.answered += 1
            if Engine.answered == self.fails_at:
                raise InterruptedError
            return [{"text": prompt["tokens"][0]} for prompt in prompts]

        predict = answer
        run_all = evaluation_engine.Engine.run_all

        def alpha_for(self, density, others):
            return density if others["piece_size"] else density / 2

    return Engine


# What no setting is to be decided by.
ALL_SETTINGS = {"max_density": 1.0, "min_append_tokens": 0}


def test_neither_a_guard_nor_short_appends_make_what_is_measured_dense():
    assert evaluation_engine.options_of({"options": {"alpha": 0.1}}) == {**ALL_SETTINGS, "alpha": 0.1}
    assert evaluation_engine.options_of({"options": {"min_append_tokens": 7}})["min_append_tokens"] == 7


@pytest.fixture
def sparse(tmp_path, monkeypatch):
    """Runs a sparse job with a model's own alpha of 0.02; its result."""
    from vllm_flashprefill.config import FlashPrefillConfig

    used = []
    monkeypatch.setattr(evaluation_engine, "what_ran", lambda llm: {})
    own = dict(alpha=0.02, **ALL_SETTINGS)
    monkeypatch.setattr(FlashPrefillConfig, "from_vllm", classmethod(lambda cls, _, first={}: cls(**{**own, **first})))

    def run(settings, density=None, fails_at=None, name="result.json"):
        used.clear()
        Engine = engine_class(used)
        monkeypatch.setattr(evaluation_engine, "Engine", Engine)
        job = {"mode": "sparse", "job": "", "options": {}, "settings": settings, "target_density": density}
        job["fails_at"] = fails_at
        (tmp_path / "job.json").write_text(json.dumps(job))
        samples = [{"tokens": [n], "length": 600, "task": "ab"[n % 2]} for n in range(4)]
        texts = [{"tokens": [7], "length": 600, "task": "texts"}]
        (tmp_path / "prompts.json").write_text(json.dumps({"samples": samples, "texts": texts}))
        try:
            evaluation_engine.main(tmp_path / "job.json", tmp_path / "prompts.json", tmp_path / name)
        except InterruptedError:
            pass
        return SimpleNamespace(**json.loads((tmp_path / name).read_text()), answered=Engine.answered, used=used)

    return run


def names(result):
    return [(setting["name"], bool(setting["calibrated"])) for setting in result.settings]


def test_settings_of_one_engine(sparse):
    # One setting, the model's own: nothing of the engine is changed.
    result = sparse([{}])
    assert names(result) == [("alpha 0.02", False)] and not result.used
    assert [answer["text"] for answer in result.settings[0]["samples"]] == [0, 1, 2, 3]
    counts = [(each["of"], each["task"], each["visible_blocks"]) for each in result.settings[0]["counts"]]
    assert counts == [("samples", "a", 2), ("samples", "b", 2), ("texts", "texts", 2)]
    result = sparse([{"alpha": 0.3}, {}, {"alpha": 0.3, "piece_size": 0}, {"alpha": 0.02}], name="other.json")
    assert names(result) == [("alpha 0.3", False), ("alpha 0.02", False), ("alpha 0.3, piece_size 0", False)]
    assert [(each["alpha"], each["piece_size"]) for each in result.used] == [(0.3, 8), (0.02, 8), (0.3, 0), (0.02, 8)]
    assert all("num_dense_layers" not in each for each in result.used)


def test_a_density_is_had_with_the_other_options_of_each_setting(sparse):
    result = sparse([{"alpha": 0.1}, {"piece_size": 0}, {"alpha": 0.2}], density=0.5)
    asked = [("alpha 0.1", False), ("alpha 0.02, piece_size 0", False), ("alpha 0.2", False)]
    assert names(result) == [*asked, ("alpha 0.5", True), ("alpha 0.25, piece_size 0", True)]
    assert result.complete


def test_an_alpha_found_is_for_the_blocks_it_was_found_with(sparse, monkeypatch):
    """A preset of whole blocks, beside which an alpha alone would be for pieces."""
    from vllm_flashprefill.config import PRESETS_BY_HEAD_SIZE, FlashPrefillConfig, preset_beside

    def from_vllm(cls, _, first=MappingProxyType({})):
        return cls.from_options(first, preset_beside(PRESETS_BY_HEAD_SIZE[64]["llama"], first), ALL_SETTINGS)

    monkeypatch.setattr(FlashPrefillConfig, "from_vllm", classmethod(from_vllm))
    result = sparse([{}, {"alpha": 0.3}], density=0.5)
    asked = [("alpha 0.005, piece_size 0", False), ("alpha 0.3", False)]
    assert names(result) == [*asked, ("alpha 0.25, piece_size 0", True)]


def test_what_is_done_is_not_done_again(sparse):
    first = sparse([{"alpha": 0.3}, {"alpha": 0.4}], fails_at=5)
    assert not first.complete
    assert [setting.get("samples") for setting in first.settings] == [
        [{"text": n} for n in range(4)],
        [{"text": 0}, None, {"text": 2}, None],
    ]
    rest = sparse([{"alpha": 0.3}, {"alpha": 0.4}], density=0.5)
    assert rest.complete and rest.answered == 2 + 3
    assert rest.settings[0] == first.settings[0]
    assert all(len(setting["counts"]) == 3 and None not in setting["samples"] for setting in rest.settings)
    again = sparse([{"alpha": 0.4}], density=0.5)
    assert again.answered == 0 and again.settings == rest.settings
