"""Prompts with a fact or a chain of them in a long text."""

import pytest

from evaluation import scoring, tasks, text
from scripts import generate
from tests.support.words import Words
from vllm_flashprefill import real_model

# Of scripts/facts.py in commit 45975e5, on which the preset for heads of 64 was first chosen.
PRESET_NAMES = {"old lighthouse", "copper bridge", "winter garden", "eastern tower", "marble fountain"}
PRESET_NAMES |= {"quiet valley", "amber workshop", "iron gate", "paper museum", "green ferry"}
PRESET_CODES = {"5128", "8640", "2937", "6482", "1759", "3204", "9416", "7063", "4581", "8372"}


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


class ChatWords(Words):
    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        (turn,) = turns
        return f" <system> Be brief. <user> {turn['content']} <assistant> "


@pytest.mark.parametrize("task", tasks.TASKS)
def test_in_a_chat_the_question_is_the_users_and_the_answer_the_assistants(task, prose):
    tokenizer = ChatWords(adds_bos=True)
    maker = tasks.Maker(tokenizer, prose, chat=True)
    plain = tasks.make_samples(tasks.Maker(tokenizer, prose), [task], [900], [2], seed=0)
    for sample, other in zip(tasks.make_samples(maker, [task], [900], [2], seed=0), plain, strict=True):
        assert (sample.expected, sample.depth) == (other.expected, other.depth)
        assert 892 <= len(sample.tokens) <= 900
        prompt = tokenizer.decode(sample.tokens)
        assert prompt.startswith(" <system> Be brief. <user>") and prompt.count("<user>") == 1
        said, answer = prompt.split("<assistant>")
        asked = tokenizer.decode(other.tokens).rsplit("\n\nQuestion: ", 1)[1]
        assert said.rstrip().endswith(asked.split("\nAnswer: ")[0].rstrip())
        assert answer.strip() == asked.split("\nAnswer: ")[1].strip()


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
