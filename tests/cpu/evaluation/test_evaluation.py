"""The prompts, scores and readers of `python -m evaluation`, without an engine."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation import __main__ as evaluate
from evaluation import engine as evaluation_engine
from evaluation import heatmap, readers, report, scoring, tasks, text
from scripts import generate
from vllm_flashprefill import real_model

# Of scripts/facts.py in commit 45975e5, on which the preset for heads of 64 was first chosen.
PRESET_NAMES = {"old lighthouse", "copper bridge", "winter garden", "eastern tower", "marble fountain"}
PRESET_NAMES |= {"quiet valley", "amber workshop", "iron gate", "paper museum", "green ferry"}
PRESET_CODES = {"5128", "8640", "2937", "6482", "1759", "3204", "9416", "7063", "4581", "8372"}


class Words:
    """A tokenizer that needs no model: words, digits one by one, spaces and signs."""

    bos_token_id = 0

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos
        self.pieces, self.ids = ["<s>"], {}

    def encode(self, text, add_special_tokens=True):
        ids = [0] if add_special_tokens and self.adds_bos else []
        for piece in re.findall(r" ?[A-Za-z_]+|\d|\s|.", text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.ids[piece])
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


@pytest.fixture(scope="module")
def prose():
    return text.prose()


@pytest.fixture(scope="module")
def tokenizer():
    return Words()


@pytest.fixture(scope="module")
def maker(tokenizer, prose):
    return tasks.Maker(tokenizer, prose)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [600, 2048])
def test_prompts_have_the_stated_length_and_hold_their_answers(task, length, maker, tokenizer):
    made = tasks.make_samples(maker, [task], [length], [3], seed=0)
    assert made
    for sample in made:
        prompt = tokenizer.decode(sample.tokens)
        assert all(text in prompt for text in sample.expected)
        assert scoring.score(sample.metric, ", ".join(sample.expected), sample.expected) == 1
        assert len(maker.encode(" " + ", ".join(sample.expected))) <= sample.max_tokens
        assert length - (8 if task == "shared_prefix" else 0) <= len(sample.tokens) <= length
    assert max(len(sample.tokens) for sample in made) == length


@pytest.mark.parametrize("task", ["single", "multi_key", "shared_prefix"])
def test_the_fact_is_at_the_stated_depth(task, maker, tokenizer):
    made = tasks.make_samples(maker, [task], [4096], [5], seed=1)
    assert {sample.depth for sample in made} == set(tasks.DEPTHS)
    for sample in made:
        (code,) = sample.expected
        before = tokenizer.decode(sample.tokens).index(f"is {code}")
        at = len(maker.encode(tokenizer.decode(sample.tokens)[:before]))
        assert at / len(sample.tokens) == pytest.approx(sample.depth, abs=0.04)
        asked = tokenizer.decode(sample.tokens).rsplit("Answer: ", 1)[1]
        assert f"{asked.lower()} {code}" in tokenizer.decode(sample.tokens).lower()


def test_prompts_depend_on_the_seed_alone(prose):
    def made(seed, counts, lengths=(600, 900)):
        tokenizer = Words()
        samples = tasks.make_samples(tasks.Maker(tokenizer, prose), list(tasks.TASKS), lengths, counts, seed)
        return {(s.group, s.depth): tokenizer.decode(s.tokens) for s in samples}

    first = made(0, [2, 1])
    assert first == made(0, [2, 1])
    assert first != made(1, [2, 1])
    # More prompts and other lengths leave the first ones as they are.
    more = made(0, [1, 3, 2], lengths=(512, 600, 900))
    assert {name: more[name] for name in first} == first


def test_a_group_shares_its_text(maker):
    made = tasks.make_samples(maker, ["shared_prefix"], [2048], [1], seed=0)
    assert len({sample.group for sample in made}) == 1
    assert len({tuple(sample.tokens[:1900]) for sample in made}) == 1


def test_too_short_a_prompt_says_how_long_it_must_be(maker):
    with pytest.raises(ValueError, match="a prompt needs at least"):
        tasks.make_samples(maker, ["shared_prefix"], [64], [1], seed=0)


def test_the_beginning_of_sequence_token_comes_first_where_the_tokenizer_adds_it(prose):
    for adds_bos in (True, False):
        maker = tasks.Maker(Words(adds_bos), prose)
        for sample in tasks.make_samples(maker, list(tasks.TASKS), [700], [1], seed=0):
            assert (sample.tokens[0] == 0) == adds_bos
            assert 0 not in sample.tokens[1:]
            assert len(sample.tokens) <= 700


def test_neither_facts_nor_texts_are_those_of_calibration(prose, tokenizer, maker):
    import pydoc_data.topics

    ours = {f"{adjective} {noun}" for adjective in tasks.ADJECTIVES for noun in tasks.NOUNS}
    theirs = dict(generate.FACTS)
    assert not ours & {*PRESET_NAMES, *theirs}
    assert {*PRESET_CODES, *theirs.values()} == {str(code) for code in tasks.TAKEN_CODES}
    made = tasks.make_samples(maker, list(tasks.TASKS), [700], [20], seed=0)
    assert not {text for sample in made for text in sample.expected} & {*PRESET_CODES, *theirs.values()}
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    theirs = topics + real_model.read_text("code")
    theirs = {line.strip() for line in theirs.splitlines() if len(line) > 60}
    for long_text in (prose, text.code()):
        lines = [line.strip() for line in long_text.splitlines() if len(line) > 60]
        assert sum(line in theirs for line in lines) <= len(lines) // 1000


def test_a_stream_starts_again_where_it_ends():
    stream = text.Stream(list, "abcde")
    assert stream.take(3, 9) == list("deabcdeab")


@pytest.mark.parametrize(
    "metric, answer, expected, score",
    [
        ("string_match_all", " 1234, and 99", ["1234", "5678"], 0.5),
        ("string_match_all", "The Words: APPLE", ["apple"], 1),
        ("string_match_part", "Paris, of course", ["Lyon", "paris"], 1),
        ("string_match_part", "Nice", ["Lyon", "paris"], 0),
        ("substring_exact_match", "It is The  Eiffel-Tower!", ["Eiffel Tower", "a EiffelTower"], 1),
        ("qa_f1", "the red car", ["a red bus", "blue"], 0.5),
        ("qa_f1", "nothing", ["a red bus"], 0),
        ("qa_f1_first_line", "\nred bus\nblue car", ["a red bus"], 1),
        ("count", "5 or 6", ["5"], 0.5),
        ("count", "none", ["5"], 0),
        ("retrieval", "Paragraph 12, Paragraph 3", ["Paragraph 12"], 0.5),
        ("first_number", "The pass key is 00731.", ["00731"], 1),
        ("first_number", "731", ["00731"], 0),
        ("first_number", "it is 3.50", ["3.5"], 1),
        ("choice", "B. the second", ["the second", "B"], 1),
        ("choice", "The answer is: C", ["the second", "B"], 0),
        ("choice", "I think that the answer is B", ["the second", "B"], 1),
        ("choice", "", ["the second", "B"], 0),
    ],
)
def test_scores(metric, answer, expected, score):
    assert scoring.score(metric, answer, expected) == pytest.approx(score)


def test_a_class_name_inside_the_right_one_does_not_count():
    classes = ["Date", "Other number", "number", "City"]
    assert scoring.classification("Other number\nCity", ["Other number"], classes) == 1
    assert scoring.classification("Date or City", ["City"], classes) == 0.5
    assert scoring.classification("Date", ["City"], classes) == 0


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_ruler_records(tmp_path):
    row = {"index": 0, "input": "A magic number is 12. What is it? It is", "outputs": ["12"], "length": 140}
    write(tmp_path / "niah_single_1" / "validation.jsonl", row, {**row, "index": 1, "answer_prefix": " so"}, row)
    write(tmp_path / "qa_1.jsonl", {**row, "outputs": ["12", "twelve"]})
    first, second, question = readers.read(tmp_path, limit=2)
    assert (first.task, first.prompt, first.expected) == ("niah_single_1", row["input"], ["12"])
    assert (first.metric, first.max_tokens, first.answer_prefix, first.cut) == ("string_match_all", 128, "", False)
    assert second.answer_prefix == " so"
    assert (question.task, question.metric, question.max_tokens) == ("qa_1", "string_match_part", 32)


def test_helmet_records(tmp_path):
    needles = {"context": "One is 7. Two is 8.", "query": "big-cat", "type_needle_v": "numbers", "answer": ["7", "8"]}
    vt = {"context": "VAR A = 5", "query": "5", "num_v": 1, "example": "VAR B = 4 ...", "outputs": ["A"]}
    qa = {"context": "Document 1", "question": "Who?", "answer": ["Ann"]}
    write(tmp_path / "niah_multivalue" / "validation_8192.jsonl", needles)
    write(tmp_path / "qa_2" / "validation_8192.jsonl", qa)
    write(tmp_path / "vt" / "validation_8192.jsonl", vt)
    niah, question, tracking = readers.read(tmp_path, limit=5)
    assert niah.prompt.startswith(needles["context"]) and "big-cat" in niah.prompt and "numbers" in niah.prompt
    assert (niah.expected, niah.metric) == (["7", "8"], "string_match_all")
    assert (question.metric, question.expected) == ("substring_exact_match", ["Ann"])
    assert tracking.prompt.startswith(vt["example"]) and tracking.expected == ["A"]


def test_infinitebench_records(tmp_path):
    row = {"id": 0, "context": "A long book.", "input": "Who?", "answer": ["Ann"], "options": []}
    write(tmp_path / "longbook_qa_eng.jsonl", row)
    write(tmp_path / "longbook_choice_eng.jsonl", {**row, "options": ["Bob", "Ann", "Cy", "Di"]})
    write(tmp_path / "math_find.jsonl", {**row, "answer": 17})
    write(tmp_path / "passkey.jsonl", {**row, "answer": ["00123"]})
    choice, question, number, passkey = readers.read(tmp_path, limit=5)
    assert (choice.metric, choice.expected) == ("choice", ["Ann", "B"])
    assert "B. Ann" in choice.prompt
    assert (question.metric, question.expected, question.cut) == ("qa_f1", ["Ann"], True)
    assert (number.metric, number.expected, passkey.expected) == ("first_number", ["17"], ["00123"])


def test_longbench_records(tmp_path):
    row = {"input": "Who?", "context": "A text.", "answers": ["Ann"], "length": 2, "language": "en", "_id": "x"}
    rows = [
        {**row, "dataset": "hotpotqa_e", "all_classes": None},
        {**row, "dataset": "trec", "all_classes": ["City", "Date"], "answers": ["City"]},
        {**row, "dataset": "passage_retrieval_en", "all_classes": None, "answers": ["Paragraph 3"]},
    ]
    question, kind, passage = readers.read(write(tmp_path / "mixed.jsonl", *rows), limit=5)
    assert (question.task, question.metric) == ("hotpotqa", "qa_f1")
    assert (kind.metric, kind.classes, kind.answer_prefix) == ("classification", ["City", "Date"], "")
    assert kind.prompt.endswith("Who?")
    assert passage.metric == "retrieval"


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("gov_report", {"input": "", "context": "x", "answers": ["y"], "dataset": "gov_report"}, "'gov_report'"),
        ("code_run", {"context": "x", "input": "y", "answer": 3, "options": []}, "'code_run'"),
        ("other", {"input": "x", "outputs": ["y"]}, "RULER's task 'other'"),
        ("odd", {"text": "x"}, "fields text"),
    ],
)
def test_what_has_no_reader_is_one_clear_error(tmp_path, name, row, message):
    with pytest.raises(readers.Unsupported, match=message):
        list(readers.read(write(tmp_path / f"{name}.jsonl", row), limit=5))


def test_a_long_prompt_loses_its_middle():
    assert readers.cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert readers.cut_middle(list(range(5)), 5) == list(range(5))


def test_prompts_of_data_sets_fit_the_model(tmp_path, tokenizer):
    write(tmp_path / "vt.jsonl", {"input": "x " * 30, "outputs": ["A"]}, {"input": "x " * 300, "outputs": ["A"]})
    write(tmp_path / "passkey.jsonl", {"context": "y " * 300, "input": "What?", "answer": "12"})
    options = SimpleNamespace(data=[tmp_path], limit=5, chat=False, lengths=[50, 100])
    samples, left_out, shortened = evaluate.data_samples(tokenizer, options, 100)
    cut, whole = samples
    assert left_out == {"vt": 1}
    assert shortened == {"passkey": 1}
    assert (cut.task, len(cut.tokens), cut.length) == ("passkey", 94, 100)
    assert tokenizer.decode(cut.tokens).endswith("What?\nAnswer:")
    assert (whole.task, whole.max_tokens, whole.length) == ("vt", 30, 50)


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
