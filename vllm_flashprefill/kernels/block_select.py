"""Stages 2 and 3, score and select, in one kernel: nothing of size (blocks x blocks) leaves it but the lists.

A program walks over (query block, head) pairs. For each it scores the mean keys tile by tile into a row of
scratch that is its own, then compares them with the largest and writes the indices of the kept blocks. The score
is held as log2 E, which has no maximum to subtract: E >= alpha * max E is log2 E >= log2 alpha + max log2 E.

With row_share a program goes over the mean keys twice, the first time for the sum that each row's exponentials are
divided by, and no maximum is needed later.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE, FlashPrefillConfig
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import SelectConfig, num_select_programs, select_config
from vllm_flashprefill.kernels.schedule import Schedule, Slab
from vllm_flashprefill.kernels.workspace import Workspace

LOG2_E = math.log2(math.e)


@triton.jit
def _load_query(ptrs, dtype: tl.constexpr, cache_modifier: tl.constexpr):
    q = tl.load(ptrs, cache_modifier=cache_modifier).to(tl.float32)
    return tl.minimum(tl.maximum(q, -65504.0), 65504.0).to(dtype)


@triton.jit
def _log2_sum(s, scale):
    """s: [BLOCK_N, BLOCK], mean keys by query rows. log2 of the sum over rows of exp2(scale * s)."""
    largest = tl.maximum(tl.max(s, axis=1), -1.0e30)
    return largest * scale + tl.log2(tl.sum(tl.exp2(s * scale - (largest * scale)[:, None]), axis=1))


@triton.jit
def _log2_share(s, log2_mass, scale):
    """s: [BLOCK_N, BLOCK], mean keys by query rows. log2 of the sum over rows of exp2(scale * s - log2_mass)."""
    return tl.log2(tl.sum(tl.exp2(s * scale - log2_mass[None, :]), axis=1))


@triton.jit
def _add_mass(s, scale, largest, total):
    """total * exp2(largest), [BLOCK], with a tile's exp2(scale * s) added. s: [BLOCK, BLOCK_N], rows by mean keys."""
    s *= scale
    now = tl.maximum(largest, tl.max(s, axis=1))
    return now, total * tl.exp2(largest - now) + tl.sum(tl.exp2(s - now[:, None]), axis=1)


@triton.jit(do_not_specialize=["num_work", "first_item", "num_visible", "num_mean_rows", "stride_scores"])
def _block_select_kernel(
    q_ptr,
    mean_ptr,
    requests_ptr,
    items_ptr,
    lists_ptr,
    counts_ptr,
    scores_ptr,
    block_counts_ptr,
    num_work,
    first_item,
    num_visible: tl.int64,
    scale,
    log2_limit,
    stride_qb: tl.int64,
    stride_qt,
    stride_qh,
    num_mean_rows,
    stride_scores: tl.int64,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    NUM_SINK_BLOCKS: tl.constexpr,
    NUM_WINDOW_BLOCKS: tl.constexpr,
    ROW_SHARE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    scores_row_ptr = scores_ptr + program.to(tl.int64) * stride_scores
    offs_dim = tl.arange(0, HEAD_SIZE)
    offs_n = tl.arange(0, BLOCK_N)
    offs_list = tl.arange(0, BLOCK_LIST)
    if block_counts_ptr is not None:
        if program == 0:
            tl.atomic_add(block_counts_ptr + 1, num_visible, sem="relaxed")
    for work in range(program, num_work, tl.num_programs(0)):
        head = work % NUM_HEADS
        item_ptr = items_ptr + (first_item + work // NUM_HEADS) * columns.ITEM_COLUMNS
        request_ptr = requests_ptr + tl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
        query_block = tl.load(item_ptr + columns.QUERY_BLOCK)
        list_slot = tl.load(item_ptr + columns.LIST_SLOT).to(tl.int64)
        list_start = list_slot * NUM_HEADS + head.to(tl.int64) * (query_block + 1)
        query_len = tl.load(request_ptr + columns.QUERY_LEN)
        context_len = tl.load(request_ptr + columns.CONTEXT_LEN)
        keep_all = query_block >= tl.load(request_ptr + columns.FIRST_TAIL_BLOCK)
        keep_all = keep_all | (query_block < NUM_SINK_BLOCKS + NUM_WINDOW_BLOCKS)
        keep_all = keep_all | (log2_limit == float("-inf"))

        # [BLOCK_N]
        largest = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
        if not keep_all:
            # A row outside the chunk repeats the nearest row inside it, and is left out of the sum.
            rows = query_block * BLOCK + tl.arange(0, BLOCK) - context_len
            mask_rows = (rows >= 0) & (rows < query_len)
            offs_rows = tl.load(request_ptr + columns.QUERY_START) + tl.minimum(tl.maximum(rows, 0), query_len - 1)
            batch = tl.load(request_ptr + columns.BATCH).to(tl.int64)
            q_start_ptr = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
            mean_row = (head // GROUP).to(tl.int64) * num_mean_rows + tl.load(request_ptr + columns.MEAN_START)
            # [BLOCK_N, HEAD_SIZE]
            mean_ptrs = mean_ptr + mean_row * HEAD_SIZE + offs_n[:, None] * HEAD_SIZE + offs_dim[None, :]
            q_ptrs = q_start_ptr + offs_rows.to(tl.int64)[:, None] * stride_qt + offs_dim[None, :]

            if ROW_SHARE:
                # [BLOCK]; its own block, which is always kept, has no part in it.
                row_largest = tl.full([BLOCK], -1.0e30, dtype=tl.float32)
                row_total = tl.zeros([BLOCK], dtype=tl.float32)
                # [BLOCK, HEAD_SIZE]; loaded again below, since as the other operand its layout differs and both do not
                # fit. The modifier, the default by another name, keeps the compiler from joining the loads.
                q_rows = _load_query(q_ptrs, mean_ptr.dtype.element_ty, ".ca")
                whole_end = query_block // BLOCK_N * BLOCK_N
                for start in tl.range(0, whole_end, BLOCK_N, num_stages=NUM_STAGES):
                    mean = tl.load(mean_ptrs + start * HEAD_SIZE)
                    row_largest, row_total = _add_mass(tl.dot(q_rows, tl.trans(mean)), scale, row_largest, row_total)
                if whole_end < query_block:
                    before = whole_end + offs_n < query_block
                    mean = tl.load(mean_ptrs + whole_end * HEAD_SIZE, mask=before[:, None], other=0.0)
                    s = tl.where(before[None, :], tl.dot(q_rows, tl.trans(mean)), float("-inf"))
                    row_largest, row_total = _add_mass(s, scale, row_largest, row_total)
                log2_rows = tl.log2(tl.sum(mask_rows.to(tl.float32), axis=0))
                # Rows outside the chunk have no share.
                log2_mass = tl.where(mask_rows, row_largest + tl.log2(row_total) + log2_rows, float("inf"))

            # [HEAD_SIZE, BLOCK]
            q = tl.trans(_load_query(q_ptrs, mean_ptr.dtype.element_ty, ""))
            # Blocks before the query's own are seen whole by every row: no mask, if no row is outside the chunk.
            all_rows = (query_block * BLOCK >= context_len) & ((query_block + 1) * BLOCK <= context_len + query_len)
            unmasked_end = tl.where(all_rows, query_block // BLOCK_N * BLOCK_N, 0)
            if ROW_SHARE:
                # Its own block, which is always kept, needs no share.
                unmasked_end = query_block // BLOCK_N * BLOCK_N
            for start in tl.range(0, unmasked_end, BLOCK_N, num_stages=NUM_STAGES):
                mean = tl.load(mean_ptrs + start * HEAD_SIZE)
                if ROW_SHARE:
                    score = _log2_share(tl.dot(mean, q), log2_mass, scale)
                else:
                    score = _log2_sum(tl.dot(mean, q), scale)
                    largest = tl.maximum(largest, score)
                tl.store(scores_row_ptr + start + offs_n, score)
            # Its own block is scored by the row that sees it whole: its last, or the sequence's last so far.
            own_block_row = tl.minimum((query_block + 1) * BLOCK, context_len + query_len) - 1 - context_len
            for start in tl.range(unmasked_end, query_block + 1, BLOCK_N, num_stages=1):
                blocks = start + offs_n
                mean = tl.load(mean_ptrs + start * HEAD_SIZE, mask=(blocks <= query_block)[:, None], other=0.0)
                if ROW_SHARE:
                    score = _log2_share(tl.dot(mean, q), log2_mass, scale)
                    tl.store(scores_row_ptr + blocks, score, mask=blocks < query_block)
                else:
                    visible = (blocks < query_block)[:, None] & mask_rows[None, :]
                    visible = visible | ((blocks == query_block)[:, None] & (rows == own_block_row)[None, :])
                    score = _log2_sum(tl.where(visible, tl.dot(mean, q), float("-inf")), scale)
                    largest = tl.maximum(largest, score)
                    tl.store(scores_row_ptr + blocks, score, mask=blocks <= query_block)
            tl.debug_barrier()

        threshold = log2_limit
        if not ROW_SHARE:
            threshold += tl.max(largest, axis=0)
        count = 0
        for start in range(0, query_block + 1, BLOCK_LIST):
            # [BLOCK_LIST]
            blocks = start + offs_list
            mask_blocks = blocks <= query_block
            score = tl.load(scores_row_ptr + blocks, mask=mask_blocks & (not keep_all), other=float("-inf"))
            kept = (score >= threshold) | (blocks < NUM_SINK_BLOCKS) | (query_block - blocks < NUM_WINDOW_BLOCKS)
            kept = ((kept | keep_all) & mask_blocks).to(tl.int32)
            slots = list_start + count + tl.cumsum(kept, axis=0) - 1
            tl.store(lists_ptr + slots, blocks, mask=kept != 0)
            count += tl.sum(kept, axis=0)
        tl.store(counts_ptr + work, count)
        if block_counts_ptr is not None:
            tl.atomic_add(block_counts_ptr, count.to(tl.int64), sem="relaxed")
        # The next pair writes over these scores.
        tl.debug_barrier()


def block_select(
    q: torch.Tensor,
    mean: torch.Tensor,
    schedule: Schedule,
    slab: Slab,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    lists: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    block_counts: torch.Tensor | None = None,
    launch: SelectConfig | None = None,
) -> None:
    """The kept blocks of each query block and head of a slab.

    Args:
        q: [batch, tokens, H, D].
        mean: [G, mean rows, D], from `block_mean`.
        lists: [>= slab.list_slots * H] int32, written: pair (n, h) of the slab's items owns slots
            slot_n * H + h * (i + 1) up to + i, i its query block and slot_n the item's third column; its kept
            blocks come first in ascending order, the last being i.
        counts: [>= slab.num_items * H] int32, written: kept blocks of each pair.
        scores: [programs, >= schedule.max_key_blocks] float32 scratch; its first dimension is the number of
            programs. With one program a pair, it holds each pair's log2 E afterwards (for tests); with row_share the
            log2 of its shares, and nothing for the query's own block.
        block_counts: [2] int64; the key blocks kept, and those visible, of all pairs are added.
        launch: tile sizes, to replace the committed table's.
    """
    num_heads, head_size = q.shape[2:]
    launch = launch or select_config(q.device, head_size)
    num_work = slab.num_items * num_heads
    _block_select_kernel[(min(len(scores), num_work),)](
        q,
        mean,
        schedule.requests,
        schedule.items,
        lists,
        counts,
        scores,
        block_counts,
        num_work,
        slab.first_item,
        slab.list_slots * num_heads,
        softmax_scale * LOG2_E,
        math.log2(config.limit) if config.limit > 0 else -math.inf,
        *q.stride()[:3],
        mean.shape[1],
        scores.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // len(mean),
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        BLOCK_N=launch.block_n,
        BLOCK_LIST=512,
        NUM_SINK_BLOCKS=config.num_sink_blocks,
        NUM_WINDOW_BLOCKS=config.num_window_blocks,
        ROW_SHARE=config.row_share,
        NUM_STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        maxnreg=launch.max_registers,
    )


def score_scratch(q: torch.Tensor, schedule: Schedule, workspace: Workspace | None = None) -> torch.Tensor:
    """Scratch for `block_select`: one row of scores for each program that the GPU holds at once."""
    empty = (workspace or Workspace(q.device)).empty
    return empty((num_select_programs(q.device, q.shape[-1]), schedule.max_key_blocks), torch.float32)
