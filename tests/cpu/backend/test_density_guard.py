from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_flashprefill import counters
from vllm_flashprefill.backend.attention_impl import FlashPrefillImplMixin
from vllm_flashprefill.backend.density_guard import DENSE_STEPS, MIN_VISIBLE_BLOCKS, DensityGuard
from vllm_flashprefill.backend.device_counts import device_counts
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.plan import SparseRequest, StepPlan
from vllm_flashprefill.routing import DenseReason

HEADS = 4
CONFIG = FlashPrefillConfig(alpha=0.1, max_density=0.8)


def plan_of(*lengths, dense_tokens=None):
    requests = [SparseRequest(index, 0, length, 0, length) for index, length in enumerate(lengths)]
    return StepPlan(tuple(requests), np.empty(0, dtype=np.int64), dense_tokens or {})


PLAN = plan_of(4096)
assert PLAN.visible_blocks == MIN_VISIBLE_BLOCKS


class Layer:
    """A guard, and the counts of a layer that keeps a share of its blocks."""

    def __init__(self, density, config=CONFIG):
        self.density, self.config = density, config
        self.arrived = np.zeros(2, dtype=np.int64)
        self.guard = DensityGuard(self.arrived, HEADS)

    def run(self, plan=PLAN):
        """Whether the step was dense."""
        is_dense = self.guard.is_dense(plan, self.config)
        if not is_dense:
            self.arrive(plan)
        return is_dense

    def arrive(self, plan=PLAN):
        visible = plan.visible_blocks * HEADS
        self.arrived += np.array([int(self.density * visible), visible])


def test_a_layer_above_is_dense_for_a_while_and_tries_again():
    layer = Layer(0.9)
    steps = [layer.run() for _ in range(2 * (DENSE_STEPS + 1) + 1)]
    assert steps == [False, *[True] * DENSE_STEPS, False, *[True] * DENSE_STEPS, False]


def test_a_layer_that_has_become_sparser_stays_sparse():
    layer = Layer(0.9)
    for _ in range(DENSE_STEPS + 1):
        layer.run()
    layer.density = 0.3
    assert not any(layer.run() for _ in range(50))


@pytest.mark.parametrize("density", [0.0, 0.5, 0.8])
def test_a_layer_at_the_limit_or_below_stays_sparse(density):
    layer = Layer(density)
    assert not any(layer.run() for _ in range(50))


@pytest.mark.parametrize(
    "config", [FlashPrefillConfig(alpha=0.1, max_density=1), FlashPrefillConfig(alpha=0.0, max_density=0.0)]
)
def test_never_with_max_density_1_or_alpha_0(config):
    layer = Layer(1.0, config)
    assert not any(layer.run() for _ in range(50))


def test_a_few_blocks_say_nothing_until_they_are_many():
    layer = Layer(0.9)
    plan = plan_of(1000)
    needed = -(-MIN_VISIBLE_BLOCKS // plan.visible_blocks)
    assert [layer.run(plan) for _ in range(needed + 1)] == [False] * needed + [True]


def test_a_longer_prompt_is_sparse_and_ends_the_dense_steps():
    layer = Layer(0.9)
    assert [layer.run(), layer.run(), layer.run(plan_of(4000))] == [False, True, True]
    layer.density = 0.1
    assert not layer.run(plan_of(4097))
    assert not layer.run()


def test_a_batch_of_short_prompts_is_as_long_as_the_longest():
    layer = Layer(0.9)
    layer.run()
    assert layer.run(plan_of(4096, 1000, 4096))
    assert not layer.run(plan_of(4096, 1000, 4224))


def test_chunks_of_a_dense_prompt_are_sparse_and_the_next_prompt_of_that_length_is_not():
    layer = Layer(0.9)
    chunks = [StepPlan((SparseRequest(0, 0, 8192, context, 65_536),)) for context in range(0, 65_536, 8192)]
    assert [layer.run(chunk) for chunk in chunks] == [False] * 8
    assert [layer.run(chunk) for chunk in chunks] == [True] * 8


def test_short_prompts_judged_with_a_long_one_say_nothing_of_its_length():
    layer = Layer(0.9)
    short, long = plan_of(2048), plan_of(8192)
    assert [layer.run(short), layer.run(long)] == [False, False]
    assert not layer.run(long)
    assert layer.run(long)


def test_what_was_judged_does_not_count_again():
    layer = Layer(0.1)
    layer.run(plan_of(65_536))
    layer.density = 0.95
    assert [layer.run(), layer.run()] == [False, True]


def test_counts_that_arrive_late_are_of_older_steps():
    """On a GPU, those of a step that was launched before the counts of the step before it had arrived."""
    layer = Layer(0.9)
    layer.run()
    assert layer.run()
    layer.arrive()
    steps = [layer.run() for _ in range(DENSE_STEPS + 1)]
    assert steps == [*[True] * (DENSE_STEPS - 1), False, True]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_density_of_short_steps_is_not_taken_for_that_of_the_long_ones_after(lag):
    layer, on_their_way = Layer(0.9), []
    long = StepPlan((SparseRequest(0, 0, 2048, 64 * 1024, 128 * 1024),))
    dense = []
    for plan, density in [(PLAN, 0.9)] * 3 + [(long, 0.1)] * 20:
        dense.append(layer.guard.is_dense(plan, CONFIG))
        on_their_way += [] if dense[-1] else [(plan, density)]
        if len(on_their_way) > lag:
            arrived, layer.density = on_their_way.pop(0)
            layer.arrive(arrived)
    assert not any(dense[3:])


class VllmImpl:
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        self.dense.append(attn_metadata)


class Impl(FlashPrefillImplMixin, VllmImpl):
    """A layer on a device without memory: a read of what is there, which on a GPU would be waited for, raises."""

    def __init__(self, config=CONFIG):
        self.flashprefill_config = config
        self.num_heads = HEADS
        self._dense_reason_known, self._dense_reason = True, None
        self.dense, self.sparse = [], []

    def forward_sparse(self, layer, query, key, value, kv_cache, attn_metadata, output):
        self.sparse.append(attn_metadata)

    def run(self, plan):
        query = torch.empty(plan.num_tokens, HEADS, 64, device="meta")
        metadata = SimpleNamespace(flashprefill=SimpleNamespace(plan=plan))
        self.forward(None, query, None, None, None, metadata, None)
        return metadata


@pytest.fixture
def own_counts(shared_stats):
    device_counts.cache_clear()
    yield
    device_counts.cache_clear()


def test_tokens_of_a_guarded_step_are_counted_and_the_whole_batch_is_vllms(own_counts):
    impl, other = Impl(), Impl()
    plan = plan_of(4096, 5000, dense_tokens={DenseReason.DECODE: 3})
    visible = plan.visible_blocks * HEADS
    assert impl.run(plan) is impl.sparse[0] and other.run(plan) is other.sparse[0]
    impl._counts.arrived[:] = visible * 9 // 10, visible
    other._counts.arrived[:] = visible // 10, visible
    assert impl.run(plan) is impl.dense[0]
    assert other.run(plan) is other.sparse[1]
    assert counters.read_stats().dense_tokens == {"density": 9096, "decode": 4 * 3}


def test_a_step_with_nothing_sparse_is_not_the_guards(own_counts):
    impl = Impl()
    impl.run(PLAN)
    impl._counts.arrived[:] = 10_000, 10_000
    decode = plan_of(dense_tokens={DenseReason.DECODE: 1})
    for _ in range(2 * DENSE_STEPS):
        impl.run(decode)
    assert counters.read_stats().dense_tokens == {"decode": 2 * DENSE_STEPS}
    impl.run(PLAN)
    assert len(impl.sparse) == 1 and len(impl.dense) == 2 * DENSE_STEPS + 1


def test_the_options_of_a_running_layer_are_followed(own_counts):
    impl = Impl()
    impl.run(PLAN)
    impl._counts.arrived[:] = 10_000, 10_000
    impl.flashprefill_config = FlashPrefillConfig(alpha=0.0)
    impl.run(PLAN)
    assert len(impl.sparse) == 2 and not impl.dense
