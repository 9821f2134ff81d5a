"""The kernels' scratch, one buffer for all layers: vLLM must have it before it measures what memory is left."""

from __future__ import annotations

import functools
import math

import torch

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import max_parts, num_select_programs
from vllm_flashprefill.kernels.schedule import LIST_BYTES

# Start of each tensor in the buffer: tensor descriptors and vector loads want at most this.
ALIGNMENT = 256


class Workspace:
    """A buffer that each call of the pipeline cuts its scratch from, anew. For one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0
        self._cut: dict[tuple, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel()

    def reserve(self, num_bytes: int) -> None:
        """Make the buffer at least this large."""
        if num_bytes > self.num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._buffer.device)
            self._used = 0
            self._cut.clear()

    def rewind(self) -> None:
        """Start again: what `empty` gave so far is given again."""
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with anything in it, from the buffer or, where that is full, of its own."""
        start, num_bytes = self._used, math.prod(shape) * dtype.itemsize
        end = start + num_bytes
        if end > self.num_bytes:
            return torch.empty(shape, dtype=dtype, device=self._buffer.device)
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        # Each layer of a step asks for the same.
        key = start, shape, dtype
        if key not in self._cut:
            if len(self._cut) >= 256:
                self._cut.clear()
            self._cut[key] = self._buffer[start:end].view(dtype).view(shape)
        return self._cut[key]


@functools.cache
def shared_workspace(device: torch.device) -> Workspace:
    """The workspace of a device, for all layers of all models on it."""
    return Workspace(device)


def scratch_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    max_query_tokens: int,
    max_seq_len: int,
    num_pieces: int,
    fp8_products: bool,
    device: torch.device,
) -> int:
    """What the pipeline takes for the largest step: one sequence of `max_seq_len`, the step's others whole prompts.

    A step of more long sequences than that takes what is missing from PyTorch's allocator.
    """
    key_blocks = -(-max_seq_len // BLOCK_SIZE)
    # A chunk can begin and end within a block.
    query_blocks = 2 * -(-max_query_tokens // BLOCK_SIZE) + 1
    mean = num_kv_heads * (key_blocks + query_blocks) * head_size * 2
    pieces = num_pieces * mean
    # Of each mean, in 2 bytes, the values of a block in 1.
    value_tiles = mean * BLOCK_SIZE // 2 if fp8_products else 0
    scores = num_select_programs(device, head_size, num_pieces > 0) * key_blocks * 4
    list_slots = min(query_blocks * key_blocks, max(LIST_BYTES // (4 * num_heads), key_blocks))
    counts = query_blocks * num_heads * 4
    part_rows = max_parts(device) * columns.PART_COLUMNS * 4 + counts
    part_sums = max_parts(device) * BLOCK_SIZE * (head_size + 1) * 4
    lists = list_slots * num_heads * 4
    return mean + pieces + value_tiles + scores + lists + counts + part_rows + part_sums + 8 * ALIGNMENT
