"""Seconds of selection and attention: of every sparse layer on the CPU, on a GPU from one in many and without waiting.

On a GPU a layer whose turn it is records CUDA events between its stages. A later layer reads them, once they are done,
and has them stand for all layers since the turn before.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_flashprefill.counters import recorder

# More than the layers of most models, so at most one a step; prime, so that each layer has its turn.
LAYERS_PER_TURN = 127


class StageTimes:
    """The times of one GPU. Its layers run one after another, and none of them while a graph is captured.

    Args:
        make_event: a new timing event as of ``torch.cuda.Event``.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        # As many as a layer has needed; each turn records the same ones again.
        self._events: list[Any] = []
        self._num_recorded = 0
        self._layers_since = 0
        self._layers_timed = 0

    def next_layer(self) -> Callable[[], None] | None:
        """What the next sparse layer calls before its first stage and after each selection and each attention.

        None where it is not its turn.
        """
        self._layers_since += 1
        if self._layers_since < LAYERS_PER_TURN or not self._read():
            return None
        self._layers_timed, self._layers_since = self._layers_since, 0
        return self._mark

    def _mark(self) -> None:
        if self._num_recorded == len(self._events):
            self._events.append(self._make_event())
        self._events[self._num_recorded].record()
        self._num_recorded += 1

    def _read(self) -> bool:
        """Give the recorder the times of the last turn; whether the events are free for another one."""
        events = self._events[: self._num_recorded]
        if events and not events[-1].query():
            return False
        scale = self._layers_timed / 1000
        seconds = [scale * start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        if seconds:
            _record(sum(seconds[::2]), sum(seconds[1::2]))
        self._num_recorded = 0
        return True


class HostStageTimes:
    """The times of the CPU, where a stage is over when the next begins."""

    def next_layer(self) -> Callable[[], None]:
        """What the next sparse layer calls, as of `StageTimes`."""
        times: list[float] = []

        def mark() -> None:
            times.append(time.perf_counter())
            if len(times) == 3:
                start, selected, attended = times
                _record(selected - start, attended - selected)
                del times[:2]

        return mark


def _record(selection: float, attention: float) -> None:
    recorder().add_sparse(0, kept_blocks=0, visible_blocks=0, selection=selection, attention=attention)


@functools.cache
def stage_times(device: torch.device) -> StageTimes | HostStageTimes:
    """The times of a device."""
    if device.type == "cpu":
        return HostStageTimes()
    return StageTimes(functools.partial(torch.cuda.Event, enable_timing=True))
