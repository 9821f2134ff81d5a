"""What the kernels must know of a batch, worked out on the host and uploaded in one copy.

A request row describes one sequence, an item one query block of it. Items are sorted by the work expected of
them, heaviest first, so that the few query blocks that attend to everything do not run alone at the end. They are
cut into slabs whose block lists fit `LIST_BYTES`; a slab's scratch is used again by the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.device import upload
from vllm_flashprefill.plan import StepPlan

LIST_BYTES = 128 << 20

# int32 columns of a request row; the kernels read them by number.
REQUEST_COLUMNS = (
    "batch",  # index along the batch dimension of q, and of k and v where they are not paged
    "query_start",  # first token in q
    "query_len",
    "context_len",
    "kv_start",  # first token in k and v where they are not paged
    "table_row",  # row of the block table where they are
    "mean_start",  # first row of its blocks in the mean keys
    "first_tail_block",  # query blocks from here on attend to everything
)
# int32 columns of an item row: request, query block, first slot of its block lists (per head) in its slab.
ITEM_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sequence and the chunk of it to attend; fields as in `REQUEST_COLUMNS`."""

    query_len: int
    context_len: int
    prompt_len: int
    batch: int = 0
    query_start: int = 0
    kv_start: int = 0
    table_row: int = 0

    @property
    def num_key_blocks(self) -> int:
        return -(-(self.context_len + self.query_len) // BLOCK_SIZE)


@dataclasses.dataclass(frozen=True)
class Slab:
    """Items [first_item, first_item + num_items), dense ones first; their lists take list_slots entries a head."""

    first_item: int
    num_items: int
    num_dense_items: int
    list_slots: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A batch as the kernels see it.

    Attributes:
        requests: [requests, 8] int32 on the device.
        items: [items, 3] int32 on the device.
        next_pair: [1] int32 on the device, a counter that is 0 between kernels.
        num_mean_rows: key blocks of all sequences.
        max_key_blocks: key blocks of the longest sequence.
        slabs: the items' slabs, in order.
    """

    requests: torch.Tensor
    items: torch.Tensor
    next_pair: torch.Tensor
    num_mean_rows: int
    max_key_blocks: int
    slabs: tuple[Slab, ...]


def schedule_sequences(
    sequences: SequenceOf[Sequence],
    *,
    num_heads: int,
    num_dense_tail_blocks: int,
    device: torch.device,
    list_bytes: int = LIST_BYTES,
) -> Schedule:
    """The schedule of some sequences, none of them without queries. Does not wait for the device."""
    key_blocks = np.array([sequence.num_key_blocks for sequence in sequences], dtype=np.int64)
    mean_starts = np.cumsum(key_blocks) - key_blocks
    requests = np.empty((len(sequences), len(REQUEST_COLUMNS)), dtype=np.int32)
    indices, blocks, dense = [], [], []
    for row, sequence in enumerate(sequences):
        tail = -(-sequence.prompt_len // BLOCK_SIZE) - num_dense_tail_blocks
        requests[row] = (
            sequence.batch,
            sequence.query_start,
            sequence.query_len,
            sequence.context_len,
            sequence.kv_start,
            sequence.table_row,
            mean_starts[row],
            tail,
        )
        block = np.arange(sequence.context_len // BLOCK_SIZE, sequence.num_key_blocks)
        indices.append(np.full(len(block), row))
        blocks.append(block)
        dense.append(block >= tail)
    index, block, is_dense = np.concatenate(indices), np.concatenate(blocks), np.concatenate(dense)
    order = np.lexsort((-block, ~is_dense))
    index, block, is_dense = index[order], block[order], is_dense[order]

    # A slab holds at least one item, however long its lists.
    ends = np.cumsum(block + 1)
    slots_at_once = max(int(list_bytes) // (4 * num_heads), 1)
    items = np.empty((len(block), ITEM_COLUMNS), dtype=np.int32)
    items[:, 0], items[:, 1] = index, block
    slabs = []
    first, used = 0, 0
    while first < len(block):
        last = max(int(np.searchsorted(ends, used + slots_at_once, side="right")), first + 1)
        items[first:last, 2] = ends[first:last] - (block[first:last] + 1) - used
        slabs.append(Slab(first, last - first, int(is_dense[first:last].sum()), int(ends[last - 1]) - used))
        first, used = last, int(ends[last - 1])

    values = np.concatenate([requests.ravel(), items.ravel(), np.zeros(1, dtype=np.int32)])
    uploaded = upload(torch.from_numpy(values), device)
    return Schedule(
        requests=uploaded[: requests.size].view(requests.shape),
        items=uploaded[requests.size : -1].view(items.shape),
        next_pair=uploaded[-1:],
        num_mean_rows=int(key_blocks.sum()),
        max_key_blocks=int(key_blocks.max()),
        slabs=tuple(slabs),
    )


def cached_schedule(
    sequences: tuple[Sequence, ...], *, num_heads: int, num_dense_tail_blocks: int, device: torch.device
) -> Schedule:
    """`schedule_sequences`, kept for the next layers, which attend to the same lengths."""
    return _cached_schedule(sequences, num_heads, num_dense_tail_blocks, device, _current_stream(device))


@functools.lru_cache(maxsize=8)
def _cached_schedule(sequences, num_heads, num_dense_tail_blocks, device, stream):
    return schedule_sequences(
        sequences, num_heads=num_heads, num_dense_tail_blocks=num_dense_tail_blocks, device=device
    )


def schedule_step(plan: StepPlan, *, num_heads: int, num_dense_tail_blocks: int, device: torch.device) -> Schedule:
    """The schedule of a step's sparse requests; made by the step's first layer and kept with the plan."""
    kept = plan.__dict__.setdefault("_schedules", {})
    key = (num_heads, num_dense_tail_blocks, device, _current_stream(device))
    if key not in kept:
        sequences = [
            Sequence(
                query_len=request.query_len,
                context_len=request.context_len,
                prompt_len=request.prompt_len,
                query_start=request.query_start,
                table_row=request.index,
            )
            for request in plan.sparse
        ]
        kept[key] = schedule_sequences(
            sequences, num_heads=num_heads, num_dense_tail_blocks=num_dense_tail_blocks, device=device
        )
    return kept[key]


def _current_stream(device: torch.device) -> int:
    """What an uploaded schedule is kept by: another stream might read it before it has arrived."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
