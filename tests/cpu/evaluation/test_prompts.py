"""Each known layout of a data set becomes the tokens that its own evaluation sends."""

import json

import pytest

pytest.importorskip("transformers")

from evaluation import prompts, readers
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer

RULER = {"index": 0, "input": "One magic number is 12.\nWhat is it?", "outputs": ["12"], "length": 40}
KVPRESS = {
    "context": "One magic number is 12.\n ",
    "question": "What is it? ",
    "answer_prefix": "It is",
    "answer": ["12"],
    "task": "niah_single_1",
    "max_new_tokens": 100,
}
ASKED = "Answer from the text above, as briefly as you can.\n\nQuestion: Who?\n"
LONGBENCH = {"input": "Who?", "context": "A text.", "answers": ["Ann"], "length": 2, "language": "en", "_id": "x"}
INFINITE = {"id": 0, "context": "A book.", "input": "Who?", "answer": ["Ann"], "options": []}

# File, record, the prompt as plain text, and in a chat, with the tokens that are no text written out.
LAYOUTS = {
    "RULER": (
        "niah_single_1/validation.jsonl",
        RULER,
        "<s>One magic number is 12.\nWhat is it?",
        "<s><user>One magic number is 12.\nWhat is it?<end><assistant>",
    ),
    "RULER with an answer's prefix": (
        "niah_single_1/validation.jsonl",
        {**RULER, "length_w_model_temp": 40, "answer_prefix": " It is", "token_position_answer": 4},
        "<s>One magic number is 12.\nWhat is it? It is",
        "<s><user>One magic number is 12.\nWhat is it?<end><assistant> It is",
    ),
    "RULER in a chat template": (
        "niah_single_1/validation.jsonl",
        {**RULER, "input": "<s><user>What is it?<end><assistant>", "answer_prefix": " It is"},
        "<s><user>What is it?<end><assistant> It is",
        None,
    ),
    "RULER in a chat template without the first token": (
        "vt/validation.jsonl",
        {**RULER, "input": "<user>What is it?<end><assistant>It is"},
        "<s><user>What is it?<end><assistant>It is",
        None,
    ),
    "lm-eval": (
        "niah_single_1.jsonl",
        {**RULER, "max_length": 4096, "gen_prefix": "It is"},
        "<s>One magic number is 12.\nWhat is it? It is",
        "<s><user>One magic number is 12.\nWhat is it?<end><assistant>It is",
    ),
    "lm-eval with a space": (
        "ruler_vt.jsonl",
        {**RULER, "input": "What is it?\n", "max_length": 4096, "gen_prefix": "It is"},
        "<s>What is it?\nIt is",
        "<s><user>What is it?\n<end><assistant>It is",
    ),
    "lm-eval without a prefix": (
        "ruler_qa_squad.jsonl",
        {**RULER, "max_length": 4096, "gen_prefix": ""},
        "<s>One magic number is 12.\nWhat is it?",
        "<s><user>One magic number is 12.\nWhat is it?<end><assistant>",
    ),
    "kvpress": (
        "niah_single_1.jsonl",
        KVPRESS,
        ["<s><user>One magic number is 12.\n ", "What is it? <end><assistant>It is"],
        ["<s><user>One magic number is 12.\n ", "What is it? <end><assistant>It is"],
    ),
    "kvpress' LongBench": (
        "test.jsonl",
        {**KVPRESS, "answers": ["12"], "task": "hotpotqa", "answer": None},
        ["<s><user>One magic number is 12.\n ", "What is it? <end><assistant>It is"],
        ["<s><user>One magic number is 12.\n ", "What is it? <end><assistant>It is"],
    ),
    "HELMET": (
        "qa_1/validation_8192.jsonl",
        {"context": "Document 1", "question": "Who?", "answer": ["Ann"]},
        "<s>Document 1\n\nQuestion: Who?\nAnswer:",
        "<s><user>Document 1\n\nQuestion: Who?\n<end><assistant>Answer:",
    ),
    "LongBench": (
        "hotpotqa.jsonl",
        {**LONGBENCH, "dataset": "hotpotqa", "all_classes": None},
        f"<s>A text.\n\n{ASKED}Answer:",
        f"<s><user>A text.\n\n{ASKED}<end><assistant>Answer:",
    ),
    "LongBench-E's examples": (
        "trec_e.jsonl",
        {**LONGBENCH, "dataset": "trec", "all_classes": ["Ann"], "input": "Question: Who?\nType:"},
        "<s>A text.\n\nQuestion: Who?\nType:",
        "<s><user>A text.\n\nQuestion: Who?\nType:<end><assistant>",
    ),
    "InfiniteBench": (
        "longbook_qa_eng.jsonl?download=true",
        INFINITE,
        "<s>A book.\n\nWho?\nAnswer:",
        "<s><user>A book.\n\nWho?\n<end><assistant>Answer:",
    ),
}


def only_record(folder, name, row):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
    (record,), without_metric = readers.read(folder, limit=5)
    assert not without_metric
    return record


def ids(tokenizer, text):
    parts = [text] if isinstance(text, str) else text
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_becomes_the_tokens_that_its_own_evaluation_sends(layout, chat, tmp_path):
    name, row, *texts = LAYOUTS[layout]
    record, tokenizer = only_record(tmp_path, name, row), byte_tokenizer()
    if texts[chat] is None:
        with pytest.raises(readers.BadData, match="in a chat template already; leave --chat out"):
            prompts.encode(tokenizer, record, chat)
        return
    tokens = prompts.encode(tokenizer, record, chat)
    assert tokens == ids(tokenizer, texts[chat])
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert record.expected == ["12"] or record.expected == ["Ann"]


def test_the_pieces_of_kvpress_are_encoded_one_by_one(tmp_path):
    """As it does; encoded together, the space before and the W after are one token. Without a template a line ends."""
    record, tokenizer = only_record(tmp_path, "niah_single_1.jsonl", KVPRESS), byte_tokenizer(template=None)
    tokens = prompts.encode(tokenizer, record, chat=False)
    assert tokens == ids(tokenizer, ["<s>One magic number is 12.\n ", "What is it? \nIt is"])
    assert tokens != ids(tokenizer, "<s>One magic number is 12.\n What is it? \nIt is")
    assert (record.task, record.max_tokens, record.metric) == ("niah_single_1", 100, "string_match_all")


def test_kvpress_columns_in_a_template_that_trims_and_thinks(tmp_path):
    """As with Llama 3's, and with Qwen 3's, which it has not think."""
    record = only_record(tmp_path, "niah_single_1.jsonl", {**KVPRESS, "context": "\n One magic number is 12.\n "})
    trims = TEMPLATE.replace("turn['content']", "turn['content'] | trim")
    tokenizer = byte_tokenizer(template=trims + "{% if enable_thinking is not false %}Well,{% endif %}")
    said = ["<s><user>One magic number is 12.\n ", "What is it? <end><assistant>It is"]
    assert prompts.encode(tokenizer, record, chat=False) == ids(tokenizer, said)


def test_kvpress_columns_that_are_in_a_template_are_not_put_into_another(tmp_path):
    record = only_record(tmp_path, "niah_single_1.jsonl", {**KVPRESS, "context": "<s><user>One magic number is 12."})
    with pytest.raises(readers.BadData, match="in a chat template already, which kvpress' columns get here"):
        prompts.encode(byte_tokenizer(), record, chat=False)


@pytest.mark.parametrize("layout", ["RULER", "RULER in a chat template", "lm-eval", "LongBench"])
def test_a_tokenizer_that_adds_no_first_token_gets_none_but_the_files_own(layout, tmp_path):
    name, row, plain, _ = LAYOUTS[layout]
    record, tokenizer = only_record(tmp_path, name, row), byte_tokenizer(adds_bos=False)
    text = plain if layout == "RULER in a chat template" else plain.removeprefix("<s>")
    assert prompts.encode(tokenizer, record, chat=False) == ids(tokenizer, text)


@pytest.mark.parametrize("layout, adds", [("RULER", ""), ("lm-eval", "<s>")])
def test_a_chat_template_without_the_first_token(layout, adds, tmp_path):
    """lm-eval has the tokenizer add it, where the text does not begin with it."""
    name, row, _, chat = LAYOUTS[layout]
    record, tokenizer = only_record(tmp_path, name, row), byte_tokenizer(template=TEMPLATE.removeprefix("<s>"))
    assert prompts.encode(tokenizer, record, chat=True) == ids(tokenizer, adds + chat.removeprefix("<s>"))
