"""A layer that keeps nearly every block is dense for a while: choosing blocks costs it more than they save.

Each layer looks at what has arrived on the host of its own counters (`device_counts`), and waits for nothing. What it
then does follows from the requests before, so it differs between tensor-parallel ranks, which hold other heads.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.plan import StepPlan

# Visible blocks of one head that density is judged by, at least: those of a prompt of 4,096 tokens.
MIN_VISIBLE_BLOCKS = 32 * 33 // 2
# Steps that a layer is dense for before it tries again. One that stays too dense is sparse in one step of 17, which
# costs it 3 % where the kernels take half as long again as dense attention.
DENSE_STEPS = 16


class DensityGuard:
    """When one layer is dense since it was too dense.

    Of a longer sequence a smaller share is kept, so a step with one longer than was judged is sparse, and ends the
    dense steps.

    Args:
        arrived: [2] int64, key blocks kept and visible of this layer so far; read whenever the guard is asked.
        num_heads: query heads, over which they are counted.
    """

    def __init__(self, arrived: np.ndarray, num_heads: int) -> None:
        self._arrived = arrived
        self._num_heads = num_heads
        self._judged_kept = self._judged_visible = 0
        # Of each sparse step whose counts have not been judged: blocks visible up to its end, as they will have
        # arrived, and tokens of its longest sequence.
        self._launched: deque[tuple[int, int]] = deque()
        self._launched_visible = 0
        # Steps that are still to be dense, and tokens of a sequence that they may have at most.
        self._dense_steps = self._dense_len = 0

    def is_dense(self, plan: StepPlan, config: FlashPrefillConfig) -> bool:
        """Whether the layer is dense in this step, which has sparse requests; to be asked once a step."""
        if config.alpha == 0:
            return False
        if not self._dense_steps:
            self._judge(config.max_density)
        longest = plan.longest_sparse
        if self._dense_steps and longest <= self._dense_len:
            self._dense_steps -= 1
            return True
        self._dense_steps = 0
        self._launched_visible += plan.visible_blocks * self._num_heads
        self._launched.append((self._launched_visible, longest))
        return False

    def _judge(self, max_density: float) -> None:
        kept, visible = self._arrived.tolist()
        new_kept, new_visible = kept - self._judged_kept, visible - self._judged_visible
        if new_visible < MIN_VISIBLE_BLOCKS * self._num_heads:
            return
        self._judged_kept, self._judged_visible = kept, visible
        lengths = []
        while self._launched and self._launched[0][0] <= visible:
            lengths.append(self._launched.popleft()[1])
        if lengths and new_kept > max_density * new_visible:
            self._dense_steps, self._dense_len = DENSE_STEPS, min(lengths)
