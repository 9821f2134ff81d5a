"""Density on the GPU, counted without ever waiting for it.

A layer adds its blocks to two counters on the device and has them copied to pinned memory behind it on the stream.
A thread of this process, which makes no CUDA call, carries what has arrived to the recorder until all of it has.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time

import torch

from vllm_flashprefill.counters import recorder
from vllm_flashprefill.plan import StepPlan

POLL_SECONDS = 0.02


class DeviceCounts:
    """The counters of one device.

    Attributes:
        blocks: [2] int64 on the device, key blocks kept and visible since the process began; layers add to it.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.blocks = torch.zeros(2, dtype=torch.int64, device=device)
        self._host = torch.zeros(2, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = self._host.numpy()
        self._reported = (0, 0)
        self._visible_blocks = 0
        self._lock = threading.Lock()
        self._more: threading.Event | None = None
        atexit.register(self.report)
        if on_gpu:
            self._more = threading.Event()
            threading.Thread(target=self._report_as_it_arrives, name="flashprefill-counts", daemon=True).start()

    def layer_done(self, plan: StepPlan, num_heads: int) -> None:
        """Count a layer's sparse requests, once its kernels, which added to `blocks`, are launched."""
        recorder().add_sparse(plan.num_sparse_tokens, kept_blocks=0, visible_blocks=0, selection=0.0, attention=0.0)
        self._host.copy_(self.blocks, non_blocking=True)
        self._visible_blocks += plan.visible_blocks * num_heads
        if self._more is None:
            self.report()
        else:
            self._more.set()

    def report(self) -> bool:
        """Give the recorder what has arrived; whether that is everything."""
        with self._lock:
            # In this order: blocks kept arrive with, or before, the visible ones that say all is there.
            visible, kept = int(self._arrived[1]), int(self._arrived[0])
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


@functools.cache
def device_counts(device: torch.device) -> DeviceCounts:
    """The counters of a device. Layers of any mode add to them, so they are no inference tensors."""
    with torch.inference_mode(False):
        return DeviceCounts(device)
