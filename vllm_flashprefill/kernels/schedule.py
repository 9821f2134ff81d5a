"""What the kernels must know of a batch, worked out on the host and uploaded in one copy.

A request row describes one request, an item one query block of it. Items are sorted by the work expected of
them, heaviest first, so that the few query blocks that attend to everything do not run alone at the end. They are
cut into slabs whose block lists fit `LIST_BYTES`; a slab's scratch is used again by the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.device import upload
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import num_multiprocessors
from vllm_flashprefill.plan import SparseRequest, StepPlan

LIST_BYTES = 96 << 20

# What `tiles_of_a_part` takes for the part of the visible blocks that is kept where it is not all.
ASSUMED_DENSITY = 1 / 16
# Of a multiprocessor's share of the work, the longest list that is none too long (docs/performance.md).
WHOLE_SHARE = 0.8
# A part of fewer tiles would take about as long to begin and to end.
MIN_PART_TILES = 16


@dataclasses.dataclass(frozen=True)
class Slab:
    """Items [first_item, first_item + num_items), dense ones first; their lists take list_slots entries a head.

    Lists of 1.5 times part_tiles blocks and more are split into parts of about as many; 0 for none.
    """

    first_item: int
    num_items: int
    num_dense_items: int
    list_slots: int
    part_tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A batch as the kernels see it.

    Attributes:
        requests: [requests, REQUEST_COLUMNS] int32 on the device.
        items: [items, ITEM_COLUMNS] int32 on the device.
        counters: [NUM_COUNTERS] int32 on the device, 0 between kernels.
        num_mean_rows: key blocks of all requests.
        max_key_blocks: key blocks of the longest request.
        slabs: the items' slabs, in order.
    """

    requests: torch.Tensor
    items: torch.Tensor
    counters: torch.Tensor
    num_mean_rows: int
    max_key_blocks: int
    slabs: tuple[Slab, ...]


def schedule_requests(
    sparse: Sequence[SparseRequest],
    *,
    num_heads: int,
    num_dense_tail_blocks: int,
    device: torch.device,
    list_bytes: int = LIST_BYTES,
    part_tiles: int | None = None,
) -> Schedule:
    """The schedule of some requests, none of them without queries. Does not wait for the device.

    Args:
        part_tiles: of each slab, in place of `tiles_of_a_part`.
    """
    query_blocks = [request.query_blocks for request in sparse]
    key_blocks = np.array([blocks.stop for blocks in query_blocks], dtype=np.int64)
    mean_starts = np.cumsum(key_blocks) - key_blocks
    requests = np.empty((len(sparse), columns.REQUEST_COLUMNS), dtype=np.int32)
    for row, request in enumerate(sparse):
        requests[row, columns.BATCH] = request.batch
        requests[row, columns.QUERY_START] = request.query_start
        requests[row, columns.QUERY_LEN] = request.query_len
        requests[row, columns.CONTEXT_LEN] = request.context_len
        requests[row, columns.KV_START] = request.kv_start
        requests[row, columns.TABLE_ROW] = request.index
        requests[row, columns.MEAN_START] = mean_starts[row]
        requests[row, columns.FIRST_TAIL_BLOCK] = -(-request.prompt_len // BLOCK_SIZE) - num_dense_tail_blocks
    block = np.concatenate([np.arange(blocks.start, blocks.stop) for blocks in query_blocks])
    index = np.repeat(np.arange(len(sparse)), [len(blocks) for blocks in query_blocks])
    is_dense = block >= requests[index, columns.FIRST_TAIL_BLOCK]
    order = np.lexsort((-block, ~is_dense))
    index, block, is_dense = index[order], block[order], is_dense[order]

    # A slab holds at least one item, however long its lists.
    ends = np.cumsum(block + 1)
    slots_at_once = max(int(list_bytes) // (4 * num_heads), 1)
    items = np.empty((len(block), columns.ITEM_COLUMNS), dtype=np.int32)
    items[:, columns.REQUEST], items[:, columns.QUERY_BLOCK] = index, block
    slabs = []
    first, used = 0, 0
    while first < len(block):
        last = max(int(np.searchsorted(ends, used + slots_at_once, side="right")), first + 1)
        items[first:last, columns.LIST_SLOT] = ends[first:last] - (block[first:last] + 1) - used
        num_dense, slots = int(is_dense[first:last].sum()), int(ends[last - 1]) - used
        tiles = part_tiles
        if tiles is None:
            tiles = tiles_of_a_part(block[first:last] + 1, num_dense, num_heads, num_multiprocessors(device))
        slabs.append(Slab(first, last - first, num_dense, slots, tiles))
        first, used = last, int(ends[last - 1])

    values = np.concatenate([requests.ravel(), items.ravel(), np.zeros(columns.NUM_COUNTERS, dtype=np.int32)])
    uploaded = upload(torch.from_numpy(values), device)
    return Schedule(
        requests=uploaded[: requests.size].view(requests.shape),
        items=uploaded[requests.size : -columns.NUM_COUNTERS].view(items.shape),
        counters=uploaded[-columns.NUM_COUNTERS :],
        num_mean_rows=int(key_blocks.sum()),
        max_key_blocks=int(key_blocks.max()),
        slabs=tuple(slabs),
    )


def tiles_of_a_part(visible: np.ndarray, num_dense: int, num_heads: int, num_programs: int) -> int:
    """Tiles of the parts that a slab's long lists are split into, 0 where none need be.

    Where the longest list takes nearly as long as all work takes all multiprocessors, they would wait for it. Parts are
    then a quarter of each one's share of the work.

    Args:
        visible: [items], blocks that each could keep, those of the num_dense items that keep all of them first.
    """
    work = int(visible[:num_dense].sum()) + ASSUMED_DENSITY * int(visible[num_dense:].sum())
    share = work * num_heads / num_programs
    longest = int(visible.max())
    if longest < 2 * MIN_PART_TILES or longest <= WHOLE_SHARE * share:
        return 0
    return max(math.ceil(share / 4), MIN_PART_TILES)


def schedule_step(plan: StepPlan, num_heads: int, num_dense_tail_blocks: int, device: torch.device) -> Schedule:
    """The schedule of a step's sparse requests; made by the step's first layer and kept with the plan."""
    # Another stream might read an uploaded schedule before it has arrived.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (num_heads, num_dense_tail_blocks, device, stream)
    if key not in plan.schedules:
        plan.schedules[key] = schedule_requests(
            plan.sparse, num_heads=num_heads, num_dense_tail_blocks=num_dense_tail_blocks, device=device
        )
    return plan.schedules[key]
