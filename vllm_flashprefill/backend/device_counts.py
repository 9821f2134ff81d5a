"""Density on the GPU, counted without ever waiting for it.

A layer adds its blocks to two counters of its own on the device and has them copied to pinned memory behind it on the
stream. A thread of this process, which makes no CUDA call, carries what has arrived of all layers to the recorder until
all of it has.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
from collections.abc import Callable

import torch

from vllm_flashprefill.backend.stage_times import stage_times
from vllm_flashprefill.counters import recorder
from vllm_flashprefill.plan import StepPlan

POLL_SECONDS = 0.02
# More than the layers of the engines of one process; those beyond share counters.
NUM_ROWS = 1024


class DeviceCounts:
    """The counters of one device.

    Attributes:
        blocks: [NUM_ROWS, 2] int64 on the device, key blocks kept and visible since the process began, by layer.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.blocks = torch.zeros(NUM_ROWS, 2, dtype=torch.int64, device=device)
        self._host = torch.zeros(NUM_ROWS, 2, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = self._host.numpy()
        self._num_layers = 0
        self._reported = (0, 0)
        self._visible_blocks = 0
        self._lock = threading.Lock()
        self._more: threading.Event | None = None
        atexit.register(self.report)
        if on_gpu:
            self._more = threading.Event()
            threading.Thread(target=self._report_as_it_arrives, name="flashprefill-counts", daemon=True).start()

    def new_layer(self) -> LayerCounts:
        """The counters of one more layer."""
        row = self._num_layers % NUM_ROWS
        self._num_layers += 1
        return LayerCounts(self, self.blocks[row], self._host[row])

    def expect(self, visible_blocks: int) -> None:
        """Report what arrives until so many more have."""
        self._visible_blocks += visible_blocks
        if self._more is None:
            self.report()
        elif not self._more.is_set():
            self._more.set()

    def report(self) -> bool:
        """Give the recorder what has arrived; whether that is everything."""
        with self._lock:
            # In this order: blocks kept arrive with, or before, the visible ones that say all is there.
            arrived = self._arrived[: self._num_layers]
            visible, kept = int(arrived[:, 1].sum()), int(arrived[:, 0].sum())
            new_kept, new_visible = kept - self._reported[0], visible - self._reported[1]
            if new_visible:
                recorder().add_sparse(0, new_kept, new_visible, selection=0.0, attention=0.0)
                self._reported = kept, visible
            # More, where a layer failed between the selection that counted and its end.
            return visible >= self._visible_blocks

    def _report_as_it_arrives(self) -> None:
        while True:
            self._more.wait()
            self._more.clear()
            while not self.report():
                time.sleep(POLL_SECONDS)


class LayerCounts:
    """The counters of one layer.

    Attributes:
        blocks: [2] int64 on the device, key blocks kept and visible; the layer adds to it.
        arrived: [2] int64, what of it has reached the host.
    """

    def __init__(self, device_counts: DeviceCounts, blocks: torch.Tensor, host: torch.Tensor) -> None:
        self._device_counts = device_counts
        self.blocks = blocks
        self._host = host
        self.arrived = host.numpy()
        self._stage_times = stage_times(blocks.device)

    def next_mark(self) -> Callable[[], None] | None:
        """What the layer calls between its stages where it is its turn to be timed."""
        return self._stage_times.next_layer()

    def step_done(self, plan: StepPlan, num_heads: int) -> None:
        """Count a step's sparse requests, once the layer's kernels, which added to `blocks`, are launched."""
        recorder().add_sparse(plan.num_sparse_tokens, kept_blocks=0, visible_blocks=0, selection=0.0, attention=0.0)
        self._host.copy_(self.blocks, non_blocking=True)
        self._device_counts.expect(plan.visible_blocks * num_heads)


class NoCounts:
    """In the place of `LayerCounts` for what is no request's."""

    def __init__(self, device: torch.device) -> None:
        self.blocks = torch.zeros(2, dtype=torch.int64, device=device)

    def next_mark(self) -> None:
        return None

    def step_done(self, plan: StepPlan, num_heads: int) -> None:
        pass


@functools.cache
def device_counts(device: torch.device) -> DeviceCounts:
    """The counters of a device. Layers of any mode add to them, so they are no inference tensors."""
    with torch.inference_mode(False):
        return DeviceCounts(device)
