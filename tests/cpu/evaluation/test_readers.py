"""Records of the data sets that have a reader."""

import gzip
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
    (first, second, question), _ = readers.read(tmp_path, limit=2)
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
    (niah, question, tracking), _ = readers.read(tmp_path, limit=5)
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
    (choice, question, number, passkey), _ = readers.read(tmp_path, limit=5)
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
    (question, kind, passage), _ = readers.read(write(tmp_path / "mixed.jsonl", *rows), limit=5)
    assert (question.task, question.metric) == ("hotpotqa", "qa_f1")
    assert (kind.metric, kind.classes, kind.answer_prefix) == ("classification", ["City", "Date"], "")
    assert kind.prompt.endswith("Who?")
    assert passage.metric == "retrieval"


LONGBENCH = {"input": "Who?", "context": "A text.", "answers": ["Ann"], "all_classes": None}
INFINITE = {"id": 0, "context": "A book.", "input": "Who?", "answer": ["Ann"], "options": []}
KVPRESS = {"context": "x", "question": "y", "answer_prefix": "z", "answer": ["w"], "max_new_tokens": 5}
RULER = {"input": "x", "outputs": ["y"]}


def test_a_letter_of_kvpress_stands_for_its_option_too(tmp_path):
    row = {**KVPRESS, "question": "Who?\nA. Bob\nB. Ann\nC. Cy\nD. Di", "task": "longbook_choice_eng", "answer": ["B"]}
    (record,), _ = readers.read(write(tmp_path / "test.jsonl", row), limit=5)
    assert record.expected == ["Ann", "B"]
    with pytest.raises(readers.BadData, match="line 1: answer: 'E' is no letter of the question's options"):
        readers.read(write(tmp_path / "test.jsonl", {**row, "answer": ["E"]}), limit=5)


def test_tasks_without_a_metric_are_left_out_and_named(tmp_path):
    for name in ("gov_report", "hotpotqa", "lcc", "dureader"):
        write(tmp_path / f"{name}.jsonl", *[{**LONGBENCH, "dataset": name}] * 3)
    write(tmp_path / "gov_report_e.jsonl", {**LONGBENCH, "dataset": "gov_report", "answers": []})
    for name in ("code_run", "longbook_sum_eng", "math_calc", "passkey"):
        write(tmp_path / f"{name}.jsonl?download=true", {**INFINITE, "answer": [12]})
    write(tmp_path / "loogle" / "test.jsonl", {**KVPRESS, "task": "shortdep_qa"}, {**KVPRESS, "task": "vt"})
    records, without_metric = readers.read(tmp_path, limit=2)
    assert sorted(record.task for record in records) == ["hotpotqa", "hotpotqa", "passkey", "vt"]
    assert without_metric == {
        "LongBench's 'gov_report'": ["gov_report.jsonl", "gov_report_e.jsonl"],
        "LongBench's 'lcc'": ["lcc.jsonl"],
        "LongBench's 'dureader'": ["dureader.jsonl"],
        "InfiniteBench's 'code_run'": ["code_run.jsonl?download=true"],
        "InfiniteBench's 'longbook_sum_eng'": ["longbook_sum_eng.jsonl?download=true"],
        "InfiniteBench's 'math_calc'": ["math_calc.jsonl?download=true"],
        "kvpress' 'shortdep_qa'": ["test.jsonl"],
    }


def test_a_file_of_several_tasks_is_read_for_each(tmp_path):
    tasks = ["niah_single_1", "vt", "qa_1"]
    file = write(tmp_path / "4096" / "test.jsonl", *({**KVPRESS, "task": task} for task in tasks for _ in range(4)))
    records, _ = readers.read(file, limit=2)
    assert [record.task for record in records] == [task for task in tasks for _ in range(2)]


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("other", RULER, "line 2: RULER's task 'other' is none of niah, vt, .* The fields are input, outputs"),
        ("odd", {"text": "x", "label": 3}, "line 2: no data set .* with the fields label, text"),
        ("other", {"context": "x", "answer": ["y"], "domain": "z"}, "The fields are answer, context, domain"),
        ("odd", {"a\nb": 1, "\ud83d": 2}, r"with the fields '.ud83d', 'a.nb'$"),
        # kvpress' columns without answer_prefix: the question is a whole one, not HELMET's name of a needle.
        ("niah_single_1", {"context": "x", "question": "y?", "answer": ["z"]}, "query: without it 'niah_single_1' is"),
        ("vt", {"context": "x", "question": "y?", "outputs": ["z"]}, "the fields are context, outputs, question$"),
        ("vt", {**RULER, "outputs": []}, "line 2: outputs: the list is empty"),
        ("vt", {**RULER, "outputs": ["A", " "]}, "outputs: an expected answer is empty"),
        ("vt", {**RULER, "outputs": [{"A": 1}]}, "outputs: {'A': 1} is neither a text nor a number"),
        ("vt", {**RULER, "outputs": None}, "outputs: None is neither"),
        ("vt", {**RULER, "input": ""}, "input: the text is empty"),
        ("vt", {**RULER, "input": ["x"]}, r"input: \['x'\] is no text"),
        ("vt", {**RULER, "input": "\ud83d"}, "input: half of a character"),
        ("vt", {**RULER, "gen_prefix": 3}, "gen_prefix: 3 is no text"),
        ("vt", {**KVPRESS, "max_new_tokens": "5"}, "max_new_tokens: '5' is no number of tokens"),
        ("hotpotqa", {**LONGBENCH, "answers": []}, "answers: the list is empty"),
        ("hotpotqa", {**LONGBENCH, "answers": [""]}, "answers: an expected answer is empty"),
        ("hotpotqa", {**LONGBENCH, "context": 7}, "context: 7 is no text"),
        ("passage_retrieval_en", {**LONGBENCH, "answers": ["Paragraph"]}, "answers: 'Paragraph' has no \"Paragraph\""),
        ("passage_count", {**LONGBENCH, "answers": ["many"]}, "answers: 'many' is no count"),
        ("trec", LONGBENCH, "all_classes: None is neither"),
        ("trec", {**LONGBENCH, "all_classes": ["City"]}, "answers: 'Ann' is none of the classes"),
        ("longbook_choice_eng", {**INFINITE, "options": ["Bob", "Cy"]}, "answer: 'Ann' is none of the options"),
        ("passkey", INFINITE, "answer: 'Ann' is no number"),
        ("qa_1", {"context": "x", "question": "y", "answer": [True]}, "answer: True is neither"),
    ],
)
def test_a_bad_record_is_one_error_with_file_line_and_field(tmp_path, name, row, message):
    file = write(tmp_path / f"{name}.jsonl", row)
    # As a record on the second line.
    file.write_text("\n" + file.read_text())
    with pytest.raises(readers.BadData, match=message) as error:
        readers.read(file, limit=5)
    assert str(error.value).startswith(f"{file}, line 2: ") and "\n" not in str(error.value)


LINE = json.dumps({**RULER, "input": "Köln"}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(LINE.encode()), ": this is compressed with gzip; unpack it"),
        (b"PK\x03\x04\x14", ": this is a ZIP archive; unpack it"),
        (b"PAR1\x15", ": this is a Parquet file"),
        (LINE.encode("utf-16"), ": this is UTF-16 or UTF-32; save it as UTF-8"),
        (LINE.encode("utf-16-le"), ", line 1: bytes of 0, as UTF-16"),
        (LINE.encode("utf-32"), ": this is UTF-16 or UTF-32; save it as UTF-8"),
        (LINE.encode("latin-1"), ", line 1: not UTF-8 (byte 0xf6 at"),
        (LINE.encode() + LINE.encode()[:20], ", line 2: cut off, or not JSON of one line"),
        (f"[{LINE}]".encode(), ": this is a JSON list; write its records one a line"),
        (f"\n\n[{LINE}]".encode(), ": this is a JSON list; write its records one a line"),
        (json.dumps(json.loads(LINE), indent=1).encode(), ", line 1: not JSON of one line"),
        (b"<!DOCTYPE html>\n", ", line 1: not JSON of one line"),
        (b'"text"\n', ", line 1: 'text' is no JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", ": this is a Git LFS pointer"),
        (b"[" * 100_000, ": this is a JSON list"),
        (b'{"a":' * 100_000, ", line 1: cut off, or not JSON"),
        (b"\n\n", ": no record in this file"),
        (b"", ": no record in this file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(tmp_path, content, message):
    file = tmp_path / "vt.jsonl"
    file.write_bytes(content)
    with pytest.raises(readers.BadData) as error:
        readers.read(file, limit=5)
    assert str(error.value).startswith(f"{file}{message}") and "\n" not in str(error.value)


def test_a_mark_of_utf_8_is_no_trouble(tmp_path):
    (tmp_path / "vt.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.encode())
    (record,), _ = readers.read(tmp_path, limit=5)
    assert record.prompt == "Köln"


def test_a_path_without_data_is_one_line(tmp_path):
    with pytest.raises(readers.BadData, match=r"nowhere: No such file or directory"):
        readers.read(tmp_path / "nowhere", limit=5)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "._vt.jsonl").write_bytes(b"\0")
    with pytest.raises(readers.BadData, match=r"no .jsonl files in this folder; the files there are: .parquet"):
        readers.read(tmp_path, limit=5)


@pytest.mark.parametrize("name", ["qa_1.jsonl.gz", "qa_1.jsonl.zip"])
def test_a_compressed_file_among_others_is_an_error_but_beside_what_it_holds(tmp_path, name):
    write(tmp_path / "vt.jsonl", RULER)
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(readers.BadData, match=rf"{name}: this is compressed with gzip; unpack it"):
        readers.read(tmp_path, limit=5)
    write(tmp_path / "qa_1.jsonl", RULER)
    records, _ = readers.read(tmp_path, limit=5)
    assert [record.task for record in records] == ["qa_1", "vt"]


def test_a_long_prompt_loses_its_middle():
    assert readers.cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert readers.cut_middle(list(range(5)), 5) == list(range(5))


def test_prompts_of_data_sets_fit_the_model(tmp_path, tokenizer):
    write(tmp_path / "vt.jsonl", {"input": "x " * 30, "outputs": ["A"]}, {"input": "x " * 300, "outputs": ["A"]})
    write(tmp_path / "passkey.jsonl", {"context": "y " * 300, "input": "What?", "answer": "12"})
    options = SimpleNamespace(data=[tmp_path], limit=5, chat=False, lengths=[50, 100])
    records, _ = evaluate.read_data(options)
    samples, left_out, shortened = evaluate.data_samples(tokenizer, records, options, 100)
    cut, whole = samples
    assert left_out == {"vt": 1}
    assert shortened == {"passkey": 1}
    assert (cut.task, len(cut.tokens), cut.length) == ("passkey", 94, 100)
    assert tokenizer.decode(cut.tokens).endswith("What?\nAnswer:")
    assert (whole.task, whole.max_tokens, whole.length) == ("vt", 30, 50)
