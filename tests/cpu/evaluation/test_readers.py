"""Records of the data sets that have a reader."""

import json
from types import SimpleNamespace

import pytest

from evaluation import __main__ as evaluate
from evaluation import readers


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
