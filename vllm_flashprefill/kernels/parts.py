"""Long lists, split over programs: what each part gives lies in scratch, and is joined by its log-sum-exp.

An append of a few query blocks has fewer (query block, head) pairs than the GPU has multiprocessors, and those that
attend to everything would walk the whole prefix alone. `schedule.tiles_of_a_part` says when that pays, `block_select`
splits the lists, whose lengths it is the first to know, and `sparse_attention` takes the parts before the whole lists.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import max_parts
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Schedule, Slab
from vllm_flashprefill.kernels.workspace import Workspace

LOG2_E = tl.constexpr(math.log2(math.e))

# Of a query block, that a program joins.
ROWS = 32


@dataclasses.dataclass(frozen=True)
class Parts:
    """Scratch of a slab's parts.

    Attributes:
        rows: [max_parts * PART_COLUMNS + pairs] int32: a row for each part, then each pair's first part, -1 where its
            list is whole.
        sums: [max_parts * BLOCK * (D + 1)] float32: the output of each part, [BLOCK, D], then each one's log2 of the
            sum of its exponentials, [BLOCK].
        max_parts: parts that there is room for.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    max_parts: int


def part_scratch(q: torch.Tensor, schedule: Schedule, workspace: Workspace | None = None) -> Parts | None:
    """Scratch for the parts of each slab in turn; None if none has any."""
    num_pairs = max((slab.num_items * q.shape[2] for slab in schedule.slabs if slab.part_tiles), default=0)
    if not num_pairs:
        return None
    empty, most = (workspace or Workspace(q.device)).empty, max_parts(q.device)
    rows = empty((most * columns.PART_COLUMNS + num_pairs,), torch.int32)
    return Parts(rows, empty((most * BLOCK_SIZE * (q.shape[3] + 1),), torch.float32), most)


@triton.jit
def split_list(pair, count, counters_ptr, parts_ptr, max_parts, part_tiles):
    """Rows for the parts of a pair's list, if it is long and there is room for them, and the first one's number."""
    num_parts = (count + part_tiles // 2) // part_tiles
    first_part = -1
    if num_parts > 1:
        part_tiles = tl.cdiv(count, num_parts)
        num_parts = tl.cdiv(count, part_tiles)
        first_part = tl.atomic_add(counters_ptr + columns.NUM_PARTS, num_parts, sem="relaxed")
        fits = first_part + num_parts <= max_parts
        for start in range(0, num_parts, 32):
            parts = start + tl.arange(0, 32)
            mask_parts = (parts < num_parts) & (first_part + parts < max_parts)
            row_ptrs = parts_ptr + (first_part + parts) * columns.PART_COLUMNS
            tl.store(row_ptrs + columns.PAIR, tl.where(fits, pair, -1), mask=mask_parts)
            tl.store(row_ptrs + columns.FIRST_TILE, parts * part_tiles, mask=mask_parts)
            tl.store(row_ptrs + columns.NUM_TILES, tl.minimum(count - parts * part_tiles, part_tiles), mask=mask_parts)
        first_part = tl.where(fits, first_part, -1)
    tl.store(parts_ptr + max_parts * columns.PART_COLUMNS + pair, first_part)


def split_list_ref(count: int, part_tiles: int) -> list[tuple[int, int]]:
    """(first tile, tiles) of each part that `split_list` makes of a list of so many blocks; none if it stays whole."""
    num_parts = (count + part_tiles // 2) // part_tiles
    if num_parts < 2:
        return []
    part_tiles = -(-count // num_parts)
    return [(first, min(part_tiles, count - first)) for first in range(0, count, part_tiles)]


@triton.jit(do_not_specialize=["counters_ptr", "parts_ptr", "sinks_ptr", "first_item", "max_parts"])
def _join_parts_kernel(
    out_ptr, sums_ptr, requests_ptr, items_ptr, counts_ptr, counters_ptr, parts_ptr, sinks_ptr, first_item, max_parts,
    stride_ob: tl.int64, stride_ot, stride_oh,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    if pair + tl.program_id(1) == 0:
        tl.store(counters_ptr + columns.NUM_PARTS, 0)
    part = tl.load(parts_ptr + max_parts * columns.PART_COLUMNS + pair)
    if part >= 0:
        head = pair % NUM_HEADS
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * columns.ITEM_COLUMNS
        request_ptr = requests_ptr + tl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
        offs_m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        offs_dim = tl.arange(0, HEAD_SIZE)
        sum_ptrs = sums_ptr + offs_m[:, None] * HEAD_SIZE + offs_dim[None, :]
        lse_ptrs = sums_ptr + max_parts.to(tl.int64) * (BLOCK * HEAD_SIZE) + offs_m

        count = tl.load(counts_ptr + pair)
        most = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        weight = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, HEAD_SIZE], dtype=tl.float32)
        tile = 0
        while tile < count:
            lse = tl.load(lse_ptrs + part * BLOCK)
            new_most = tl.maximum(most, lse)
            correction = tl.exp2(most - new_most)
            share = tl.exp2(lse - new_most)
            acc = acc * correction[:, None]
            acc += share[:, None] * tl.load(sum_ptrs + part.to(tl.int64) * (BLOCK * HEAD_SIZE))
            weight = weight * correction + share
            most = new_most
            tile += tl.load(parts_ptr + part * columns.PART_COLUMNS + columns.NUM_TILES)
            part += 1
        if sinks_ptr is not None:
            weight += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E - most)

        rows = tl.load(item_ptr + columns.QUERY_BLOCK) * BLOCK + offs_m - tl.load(request_ptr + columns.CONTEXT_LEN)
        mask_rows = (rows >= 0) & (rows < tl.load(request_ptr + columns.QUERY_LEN))
        offs_rows = (tl.load(request_ptr + columns.QUERY_START) + rows).to(tl.int64)
        batch = tl.load(request_ptr + columns.BATCH).to(tl.int64)
        out_ptrs = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
        out_ptrs = out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :]
        tl.store(out_ptrs, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=mask_rows[:, None])


def join_parts(
    parts: Parts,
    schedule: Schedule,
    slab: Slab,
    *,
    counts: torch.Tensor,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
) -> None:
    """The output of each pair whose list was split, after `sparse_attention` has attended to the parts.

    Args:
        counts: from `block_select`.
        sinks, out: as of `sparse_attention`.
    """
    num_heads, head_size = out.shape[2:]
    launch_kernel(
        _join_parts_kernel,
        (slab.num_items * num_heads, BLOCK_SIZE // ROWS),
        out,
        parts.sums,
        schedule.requests,
        schedule.items,
        counts,
        schedule.counters,
        parts.rows,
        sinks,
        slab.first_item,
        parts.max_parts,
        *out.stride()[:3],
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        ROWS=ROWS,
        num_warps=4,
    )
