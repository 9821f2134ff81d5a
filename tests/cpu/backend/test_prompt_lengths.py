from types import SimpleNamespace

import numpy as np
import pytest

from vllm_flashprefill.backend.prompt_lengths import INPUT_BATCH, PREPARED_INPUTS, prompt_lengths, unwatch, watch


class Runner:
    """What of vLLM's model runner is used."""

    def __init__(self, computed, scheduled, known):
        self.scheduled = SimpleNamespace(
            num_scheduled_tokens={f"request {n}": s for n, s in enumerate(scheduled)},
            total_num_scheduled_tokens=sum(scheduled),
        )
        self.input_batch = SimpleNamespace(
            num_reqs=len(computed),
            req_ids=[*self.scheduled.num_scheduled_tokens, None],
            num_computed_tokens_cpu=np.array([*computed, 99]),
            num_tokens_no_spec=np.array([*known, 99]),
        )

    def _may_reorder_batch(self, scheduler_output):
        return "reordered"


class SecondRunner:
    """What of vLLM's second model runner is used."""

    def __init__(self, computed, scheduled, known):
        self.lengths = dict(
            num_computed_tokens_np=np.array(computed),
            num_scheduled_tokens=np.array(scheduled),
            prefill_len_np=np.array(known),
        )

    def prepare_inputs(self, scheduler_output, batch_desc):
        return SimpleNamespace(**self.lengths)


def first_step(runner):
    return runner._may_reorder_batch(runner.scheduled)


def second_step(runner):
    return runner.prepare_inputs(None, batch_desc=None)


@pytest.fixture(params=[(Runner, INPUT_BATCH, first_step), (SecondRunner, PREPARED_INPUTS, second_step)])
def watched(request):
    """A runner with two requests, and what it does once a step."""
    runner_class, source, step = request.param
    original = getattr(runner_class, source.method)
    watch(runner_class, source)
    watch(runner_class, source)
    yield runner_class([0, 512], [2000, 388], [4000, 900]), step
    unwatch(runner_class, source)
    assert getattr(runner_class, source.method) is original
    assert prompt_lengths(np.array([0, 512])) is None


def test_the_lengths_are_those_of_the_batch_being_built(watched):
    runner, step = watched
    assert prompt_lengths(np.array([0, 512])) is None, "no step has run yet"
    step(runner)
    assert prompt_lengths(np.array([0, 512])).tolist() == [4000, 900]


def test_a_step_of_decodes_has_a_token_of_each(watched):
    runner, step = watched
    computed, first = [3999, 899], isinstance(runner, Runner)
    runner = type(runner)(computed, [1, 1], [4000, 900])
    step(runner)
    assert prompt_lengths(np.array(computed)).tolist() == [4000, 900]
    assert not first or prompt_lengths(np.array([4000]), 0) is None


def test_another_batch_has_none(watched):
    runner, step = watched
    step(runner)
    assert prompt_lengths(np.array([0, 0])) is None
    assert prompt_lengths(np.array([0])) is None


def test_lengths_that_are_corrected_later_are_those_of_the_step(watched):
    """For hybrid models vLLM takes refused drafts back after it has worked out the step's lengths."""
    runner, step = watched
    step(runner)
    if isinstance(runner, Runner):
        runner.input_batch.num_computed_tokens_cpu[1] -= 2
        runner.input_batch.num_tokens_no_spec[1] -= 2
    assert prompt_lengths(np.array([0, 512])).tolist() == [4000, 900]


@pytest.mark.parametrize(
    ("computed", "first_request", "lengths"),
    [
        ([0], 0, [4000]),
        ([512], 1, [900]),
        ([1500], 0, [4000]),  # the micro-batch before has the request's first tokens
        ([1500, 512], 0, [4000, 900]),
        ([600, 0], 1, [900, 0]),
        ([1999], 0, [4000]),
        ([2000], 0, None),  # beyond what the step does of it: another batch
        ([899], 1, [900]),
        ([900], 1, None),
        ([500], 1, None),
        ([0, 500], 0, None),
        ([0], 2, None),
    ],
)
def test_a_micro_batch_has_the_lengths_of_its_requests(watched, computed, first_request, lengths):
    runner, step = watched
    step(runner)
    found = prompt_lengths(np.array(computed), first_request)
    assert lengths == (None if found is None else found.tolist())


def test_requests_of_padding_have_no_prompt(watched):
    runner, step = watched
    step(runner)
    assert prompt_lengths(np.array([0, 512, 0, 0])).tolist() == [4000, 900, 0, 0]


def test_what_a_runner_returns_is_its_own():
    watch(Runner)
    try:
        assert first_step(Runner([0], [5], [5])) == "reordered"
    finally:
        unwatch(Runner)


def test_the_runner_that_stepped_last_says_it():
    """Both are watched where vLLM has both; one of them runs."""
    watch(Runner)
    watch(SecondRunner, PREPARED_INPUTS)
    try:
        first_step(Runner([0, 512], [2000, 388], [4000, 900]))
        second_step(SecondRunner([7], [63], [70]))
        assert prompt_lengths(np.array([0, 512])) is None
        assert prompt_lengths(np.array([7])).tolist() == [70]
    finally:
        unwatch(Runner)
        unwatch(SecondRunner, PREPARED_INPUTS)


@pytest.mark.parametrize("source", [INPUT_BATCH, PREPARED_INPUTS])
def test_a_runner_without_the_method_is_one_clear_error(source):
    with pytest.raises(RuntimeError, match=f"SimpleNamespace of this vLLM has no {source.method}"):
        watch(SimpleNamespace, source)
