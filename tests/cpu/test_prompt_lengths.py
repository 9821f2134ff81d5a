from types import SimpleNamespace

import numpy as np
import pytest

from vllm_flashprefill.backend.prompt_lengths import prompt_lengths, unwatch, watch


class Runner:
    """What of vLLM's model runner is used."""

    def __init__(self, computed, known):
        self.input_batch = SimpleNamespace(
            num_reqs=len(computed),
            num_computed_tokens_cpu=np.array([*computed, 99]),
            num_tokens_no_spec=np.array([*known, 99]),
        )

    def _may_reorder_batch(self, scheduler_output):
        return "reordered"


@pytest.fixture
def runner():
    original = Runner._may_reorder_batch
    watch(Runner)
    watch(Runner)
    yield Runner([0, 512], [4000, 900])
    unwatch(Runner)
    assert Runner._may_reorder_batch is original


def test_the_lengths_are_those_of_the_batch_being_built(runner):
    assert prompt_lengths(np.array([0, 512])) is None, "no step has run yet"
    assert runner._may_reorder_batch(None) == "reordered"
    assert prompt_lengths(np.array([0, 512])).tolist() == [4000, 900]


def test_another_batch_has_none(runner):
    runner._may_reorder_batch(None)
    assert prompt_lengths(np.array([0, 0])) is None
    assert prompt_lengths(np.array([0])) is None


def test_a_runner_without_the_method_is_one_clear_error():
    with pytest.raises(RuntimeError, match="SimpleNamespace of this vLLM has no _may_reorder_batch"):
        watch(SimpleNamespace)
