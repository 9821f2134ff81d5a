import pytest
import torch

from vllm_flashprefill import counters
from vllm_flashprefill.backend import stage_times as stage_times_module
from vllm_flashprefill.backend.stage_times import LAYERS_PER_TURN, StageTimes, stage_times

pytestmark = pytest.mark.usefixtures("shared_stats")


class Device:
    """A stand-in for a GPU that is `behind` or not, its clock in milliseconds, and its events."""

    def __init__(self):
        self.now = 0.0
        self.behind = False
        self.events_made = 0
        self.queries = 0

    def event(self):
        self.events_made += 1
        return Event(self)

    def run_layer(self, times, num_slabs=1, selection=2.0, attention=5.0):
        """Whether the layer was timed."""
        mark = times.next_layer()
        if mark is not None:
            mark()
        for _ in range(num_slabs):
            for duration in (selection, attention):
                self.now += duration
                if mark is not None:
                    mark()
        return mark is not None


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.now

    def query(self):
        self.device.queries += 1
        return not self.device.behind

    def elapsed_time(self, end):
        assert not self.device.behind
        return end.at - self.at


@pytest.mark.parametrize("num_slabs", [1, 3])
def test_timed_layers_stand_for_all(num_slabs):
    device = Device()
    times = StageTimes(device.event)
    timed = [device.run_layer(times, num_slabs) for _ in range(4 * LAYERS_PER_TURN)]
    assert [n for n, turn in enumerate(timed, 1) if turn] == [LAYERS_PER_TURN * n for n in (1, 2, 3, 4)]
    total = counters.read_stats()
    # The last turn is read at the next one.
    layers = 3 * LAYERS_PER_TURN * num_slabs
    assert (total.selection_seconds, total.attention_seconds) == pytest.approx((0.002 * layers, 0.005 * layers))
    assert (total.sparse_tokens, total.visible_blocks) == (0, 0)
    assert device.events_made == 1 + 2 * num_slabs
    assert device.queries == 3


def test_a_device_that_is_behind_is_not_waited_for():
    device = Device()
    times = StageTimes(device.event)
    for _ in range(LAYERS_PER_TURN):
        device.run_layer(times)
    device.behind = True
    for _ in range(2 * LAYERS_PER_TURN):
        assert not device.run_layer(times)
    assert counters.read_stats().attention_seconds == 0
    device.behind = False
    assert device.run_layer(times, selection=3.0)
    assert counters.read_stats().attention_seconds == pytest.approx(0.005 * LAYERS_PER_TURN)
    # The layers that had no turn are counted by the one that came late.
    for _ in range(LAYERS_PER_TURN):
        device.run_layer(times)
    total = counters.read_stats()
    assert total.attention_seconds == pytest.approx(0.005 * (3 * LAYERS_PER_TURN + 1))
    assert total.selection_seconds == pytest.approx(0.002 * LAYERS_PER_TURN + 0.003 * (2 * LAYERS_PER_TURN + 1))


def test_a_layer_that_failed_half_way_is_no_harm():
    device = Device()
    times = StageTimes(device.event)
    for _ in range(LAYERS_PER_TURN - 1):
        times.next_layer()
    times.next_layer()()
    for _ in range(2 * LAYERS_PER_TURN):
        device.run_layer(times)
    assert counters.read_stats().attention_seconds == pytest.approx(0.005 * LAYERS_PER_TURN)


@pytest.mark.parametrize("num_requests", [1, 3])
def test_every_layer_of_the_cpu_is_timed_and_read_at_once(monkeypatch, num_requests):
    now = [0.0]
    monkeypatch.setattr(stage_times_module.time, "perf_counter", lambda: now[0])
    for layer in (1, 2):
        mark = stage_times(torch.device("cpu")).next_layer()
        mark()
        for _ in range(num_requests):
            for duration in (2.0, 5.0):
                now[0] += duration
                mark()
        total = counters.read_stats()
        assert (total.selection_seconds, total.attention_seconds) == (
            2.0 * layer * num_requests,
            5.0 * layer * num_requests,
        )
        now[0] += 100.0
    assert (total.sparse_tokens, total.visible_blocks) == (0, 0)
