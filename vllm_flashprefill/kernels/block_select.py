"""Stages 2 and 3, score and select, in one kernel: nothing of size (blocks x blocks) leaves it but the lists.

A program takes one (query block, head) pair after another. For each it scores the mean keys tile by tile into a row of
scratch that is its own, then compares them with the largest and writes the indices of the kept blocks. The score
is held as log2 E, which has no maximum to subtract: E >= alpha * max E is log2 E >= log2 alpha + max log2 E.

With pieces those are candidates only. Their indices lie in the pair's list for the time being, their pieces are scored
by the same rows, and the blocks that are kept are written over them. A piece's score is a fraction of the row's best
piece, which is known when all candidates have been seen: a first pass over them drops those that miss alpha of what the
rows have at the ends of the list, a second scores what is left. Heads differ many times over in how many candidates
they have, so a program asks for its next pair when it is done with one. Without pieces every pair of a query block
takes as long, and they are dealt out beforehand.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE, FlashPrefillConfig
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import SelectConfig, num_select_programs, select_config
from vllm_flashprefill.kernels.fp8 import from_e4m3, has_e4m3_instruction, load_scale, scale_stride
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.parts import Parts, split_list
from vllm_flashprefill.kernels.schedule import Schedule, Slab
from vllm_flashprefill.kernels.workspace import Workspace

LOG2_E = math.log2(math.e)


@triton.jit
def _load_query(ptrs, dtype: tl.constexpr, FP8_NATIVE: tl.constexpr):
    q = tl.load(ptrs)
    if q.dtype == tl.uint8:
        return from_e4m3(q, FP8_NATIVE).to(dtype)
    else:
        return tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(dtype)


@triton.jit
def _log2_sum(s, scale):
    """s: [BLOCK_N, BLOCK], mean keys by query rows. log2 of the sum over rows of exp2(scale * s)."""
    largest = tl.maximum(tl.max(s, axis=1), -1.0e30)
    return largest * scale + tl.log2(tl.sum(tl.exp2(s * scale - (largest * scale)[:, None]), axis=1))


@triton.jit
def _score_blocks(
    q, row_weights, mean_ptr, scores_row_ptr, num_blocks, scale,
    HEAD_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Scores blocks that all rows see whole, each by its mean key and the rows of q, [HEAD_SIZE, BLOCK]; the largest.

    Weights of 0 leave out the rows that repeat another.
    """
    offs_dim = tl.arange(0, HEAD_SIZE)
    largest = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, num_blocks, BLOCK_N, num_stages=NUM_STAGES):
        # A place past the end repeats the last.
        blocks = tl.minimum(start + tl.arange(0, BLOCK_N), num_blocks - 1)
        # [BLOCK_N, BLOCK]
        s = tl.dot(tl.load(mean_ptr + blocks[:, None] * HEAD_SIZE + offs_dim[None, :]), q)
        top = tl.max(s, axis=1) * scale
        score = top + tl.log2(tl.sum(tl.exp2(s * scale - top[:, None]) * row_weights[None, :], axis=1))
        largest = tl.maximum(largest, score)
        tl.store(scores_row_ptr + blocks, score)
    return tl.max(largest, axis=0)


@triton.jit
def _write_candidates(scores_row_ptr, list_ptr, query_block, threshold, BLOCK_LIST: tl.constexpr):
    """Lists the blocks before the query's own that reach the threshold; the others' scores become -inf."""
    count = 0
    for start in range(0, query_block, BLOCK_LIST):
        blocks = start + tl.arange(0, BLOCK_LIST)
        earlier = blocks < query_block
        score = tl.load(scores_row_ptr + blocks, mask=earlier, other=float("-inf"))
        found = (score >= threshold) & earlier
        slots = count + tl.cumsum(found.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + slots, blocks, mask=found)
        tl.store(scores_row_ptr + blocks, float("-inf"), mask=earlier & (found == 0))
        count += tl.sum(found.to(tl.int32), axis=0)
    return count


@triton.jit
def _places_to_score(start, offs, num_blocks, BLOCKS: tl.constexpr):
    """Where in a list the next blocks are: its first BLOCKS, then from the last one back."""
    places = start + offs
    return tl.where(start == 0, tl.minimum(places, num_blocks - 1), num_blocks - 1 + BLOCKS - places)


@triton.jit
def _score_pieces(
    q, best, piece_ptr, scores_row_ptr, list_ptr, num_blocks, num_scored, scale,
    PIECES: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_PIECES: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Scores num_scored of the listed blocks by the rows of q, [HEAD_SIZE, BLOCK].

    best: [BLOCK], each row's largest product with a piece so far, by which these blocks are scored; returned with
        theirs.
    """
    BLOCKS: tl.constexpr = BLOCK_PIECES // PIECES
    offs_dim = tl.arange(0, HEAD_SIZE)
    offs_piece = tl.arange(0, BLOCK_PIECES)
    # Over pieces 8 apart, which a thread of a matrix product holds: nothing goes from thread to thread in the loop.
    seen = tl.full([BLOCK_PIECES // 16, 8, q.shape[1]], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, num_scored, BLOCKS, num_stages=NUM_STAGES):
        blocks = tl.load(list_ptr + _places_to_score(start, offs_piece // PIECES, num_blocks, BLOCKS))
        offs_rows = blocks.to(tl.int64) * PIECES + offs_piece % PIECES
        s = tl.dot(tl.load(piece_ptr + offs_rows[:, None] * HEAD_SIZE + offs_dim[None, :]), q)
        seen = tl.maximum(seen, tl.max(tl.reshape(s, [BLOCK_PIECES // 16, 2, 8, q.shape[1]]), axis=1))
        score = tl.max(tl.reshape(tl.max(s - best[None, :], axis=1), [BLOCKS, PIECES]), axis=1)
        at = tl.load(list_ptr + _places_to_score(start, tl.arange(0, BLOCKS), num_blocks, BLOCKS))
        tl.store(scores_row_ptr + at, score * scale)
    return tl.maximum(best, tl.max(tl.max(seen, axis=1), axis=0))


@triton.jit
def _select_pair(
    work, scores_row_ptr, q_ptr, mean_ptr, piece_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, block_counts_ptr,
    counters_ptr, parts_ptr, q_scale_ptr, first_item, max_parts, part_tiles, scale, log2_alpha, log2_candidate,
    stride_qb, stride_qt, stride_qh, stride_q_scale, num_mean_rows,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_LIST: tl.constexpr, NUM_SINK_BLOCKS: tl.constexpr, NUM_WINDOW_BLOCKS: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, NUM_STAGES: tl.constexpr, PIECE_STAGES: tl.constexpr, ONE_LOOP: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):  # fmt: skip
    """The kept blocks of one (query block, head) pair."""
    offs_dim = tl.arange(0, HEAD_SIZE)
    offs_n = tl.arange(0, BLOCK_N)
    offs_list = tl.arange(0, BLOCK_LIST)
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
    keep_all = keep_all | (log2_alpha == float("-inf"))

    threshold = log2_alpha
    if not keep_all:
        first_row = tl.maximum(query_block * BLOCK - context_len, 0)
        end_row = tl.minimum((query_block + 1) * BLOCK - context_len, query_len)
        batch = tl.load(request_ptr + columns.BATCH).to(tl.int64)
        q_start_ptr = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
        mean_row = (head // GROUP).to(tl.int64) * num_mean_rows + tl.load(request_ptr + columns.MEAN_START)
        # [BLOCK]; those outside the chunk repeat the last one inside it, and are left out of the sum.
        rows = first_row + tl.arange(0, BLOCK)
        mask_rows = rows < end_row
        offs_rows = tl.load(request_ptr + columns.QUERY_START) + tl.minimum(rows, end_row - 1)
        # [HEAD_SIZE, BLOCK]
        q_ptrs = q_start_ptr + offs_rows.to(tl.int64)[:, None] * stride_qt + offs_dim[None, :]
        q = tl.trans(_load_query(q_ptrs, mean_ptr.dtype.element_ty, FP8_NATIVE))
        scale *= load_scale(q_scale_ptr, head // GROUP, stride_q_scale)
        mean_row_ptr = mean_ptr + mean_row * HEAD_SIZE
        if PIECES:
            row_weights = mask_rows.to(tl.float32)
            most = _score_blocks(
                q, row_weights, mean_row_ptr, scores_row_ptr, query_block, scale, HEAD_SIZE, BLOCK_N, NUM_STAGES
            )
            # Its own block, which not every row sees whole, needs no score: it is kept.
            tl.store(scores_row_ptr + query_block, float("-inf"))
            tl.debug_barrier()
            num_candidates = _write_candidates(
                scores_row_ptr, lists_ptr + list_start, query_block, log2_candidate + most, BLOCK_LIST
            )
            tl.debug_barrier()
            piece_row_ptr = piece_ptr + mean_row * (PIECES * HEAD_SIZE)
            best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
            # First the ends of the list, sinks and neighbours, the best of most rows; then all; then those left.
            # Three loops written one after the other would have the queries in shared memory three times.
            FIRST: tl.constexpr = 2 * BLOCK_PIECES // PIECES if BLOCK_PIECES // PIECES > 4 else 8
            for step in range(3):
                num_scored = tl.where(step == 0, tl.minimum(num_candidates, FIRST), num_candidates)
                best = _score_pieces(
                    q, best, piece_row_ptr, scores_row_ptr, lists_ptr + list_start, num_candidates, num_scored,
                    scale, PIECES, HEAD_SIZE, BLOCK_PIECES, PIECE_STAGES,
                )  # fmt: skip
                tl.debug_barrier()
                if step == 1:
                    num_candidates = _write_candidates(
                        scores_row_ptr, lists_ptr + list_start, query_block, log2_alpha, BLOCK_LIST
                    )
                    tl.debug_barrier()
        else:
            # [BLOCK_N, HEAD_SIZE]
            mean_ptrs = mean_row_ptr + offs_n[:, None] * HEAD_SIZE + offs_dim[None, :]
            # [BLOCK_N]
            largest = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
            unmasked_end = 0
            if not ONE_LOOP:
                # Blocks before the query's own are seen whole by every row: no mask, if no row is outside the chunk.
                unmasked_end = tl.where(first_row + BLOCK == end_row, query_block // BLOCK_N * BLOCK_N, 0)
                for start in tl.range(0, unmasked_end, BLOCK_N, num_stages=NUM_STAGES):
                    score = _log2_sum(tl.dot(tl.load(mean_ptrs + start * HEAD_SIZE), q), scale)
                    largest = tl.maximum(largest, score)
                    tl.store(scores_row_ptr + start + offs_n, score)
            # Its own block is scored by the row that sees it whole: its last, or the sequence's last so far.
            own_block_row = end_row - 1
            for start in tl.range(unmasked_end, query_block + 1, BLOCK_N, num_stages=1):
                blocks = start + offs_n
                mean = tl.load(mean_ptrs + start * HEAD_SIZE, mask=(blocks <= query_block)[:, None], other=0.0)
                visible = (blocks < query_block)[:, None] & mask_rows[None, :]
                visible = visible | ((blocks == query_block)[:, None] & (rows == own_block_row)[None, :])
                score = _log2_sum(tl.where(visible, tl.dot(mean, q), float("-inf")), scale)
                largest = tl.maximum(largest, score)
                tl.store(scores_row_ptr + blocks, score, mask=blocks <= query_block)
            threshold += tl.max(largest, axis=0)
        tl.debug_barrier()

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
    if parts_ptr is not None:
        split_list(work, count, counters_ptr, parts_ptr, max_parts, part_tiles)
    # The next pair writes over these scores.
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "counters_ptr", "parts_ptr", "q_scale_ptr", "num_work", "first_item", "max_parts", "part_tiles", "num_visible",
        "num_mean_rows", "stride_scores", "stride_q_scale",
    ]
)  # fmt: skip
def _block_select_kernel(
    q_ptr,
    mean_ptr,
    piece_ptr,
    requests_ptr,
    items_ptr,
    lists_ptr,
    counts_ptr,
    scores_ptr,
    block_counts_ptr,
    counters_ptr,
    parts_ptr,
    q_scale_ptr,
    num_work,
    first_item,
    max_parts,
    part_tiles,
    num_visible: tl.int64,
    scale,
    log2_alpha,
    log2_candidate,
    stride_qb: tl.int64,
    stride_qt,
    stride_qh,
    stride_q_scale,
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
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PIECE_STAGES: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    program = tl.program_id(0)
    scores_row_ptr = scores_ptr + program.to(tl.int64) * stride_scores
    if block_counts_ptr is not None:
        if program == 0:
            tl.atomic_add(block_counts_ptr + 1, num_visible, sem="relaxed")
    if PIECES:
        work = program
        while work < num_work:
            _select_pair(
                work, scores_row_ptr, q_ptr, mean_ptr, piece_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr,
                block_counts_ptr, counters_ptr, parts_ptr, q_scale_ptr, first_item, max_parts, part_tiles, scale,
                log2_alpha, log2_candidate, stride_qb, stride_qt, stride_qh, stride_q_scale, num_mean_rows, NUM_HEADS,
                GROUP, HEAD_SIZE, BLOCK, BLOCK_N, BLOCK_LIST, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS, PIECES,
                BLOCK_PIECES, NUM_STAGES, PIECE_STAGES, ONE_LOOP, FP8_NATIVE,
            )  # fmt: skip
            # Every program asks once in vain; the last to ask leaves the counter as it found it.
            asked = tl.atomic_add(counters_ptr + columns.NEXT_WORK, 1, sem="relaxed")
            if asked == num_work - 1:
                tl.store(counters_ptr + columns.NEXT_WORK, 0)
            work = asked + tl.num_programs(0)
    else:
        for work in range(program, num_work, tl.num_programs(0)):
            _select_pair(
                work, scores_row_ptr, q_ptr, mean_ptr, piece_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr,
                block_counts_ptr, counters_ptr, parts_ptr, q_scale_ptr, first_item, max_parts, part_tiles, scale,
                log2_alpha, log2_candidate, stride_qb, stride_qt, stride_qh, stride_q_scale, num_mean_rows, NUM_HEADS,
                GROUP, HEAD_SIZE, BLOCK, BLOCK_N, BLOCK_LIST, NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS, PIECES,
                BLOCK_PIECES, NUM_STAGES, PIECE_STAGES, ONE_LOOP, FP8_NATIVE,
            )  # fmt: skip


def block_select(
    q: torch.Tensor,
    mean: torch.Tensor,
    schedule: Schedule,
    slab: Slab,
    *,
    pieces: torch.Tensor | None = None,
    config: FlashPrefillConfig,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    lists: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    parts: Parts | None = None,
    block_counts: torch.Tensor | None = None,
    launch: SelectConfig | None = None,
) -> None:
    """The kept blocks of each query block and head of a slab.

    Args:
        q: [batch, tokens, H, D]; e4m3 as uint8.
        q_scale: as of `api.flash_prefill_paged`.
        mean: [G, mean rows, D], from `block_mean`.
        pieces: [G, mean rows, pieces of a block, D], likewise; the mean keys choose candidates alone, if given.
        lists: [>= slab.list_slots * H] int32, written: pair (n, h) of the slab's items owns slots
            slot_n * H + h * (i + 1) up to + i, i its query block and slot_n the item's third column; its kept
            blocks come first in ascending order, the last being i.
        counts: [>= slab.num_items * H] int32, written: kept blocks of each pair.
        scores: [programs, >= schedule.max_key_blocks] float32 scratch; its first dimension is the number of
            programs. With one program a pair, it holds each pair's log2 E afterwards (for tests); with pieces the
            log2 of its score, -inf where a block is no candidate or was dropped in the first pass.
        parts: from `parts.part_scratch`, written: what long lists are split into.
        block_counts: [2] int64; the key blocks kept, and those visible, of all pairs are added.
        launch: tile sizes, to replace the committed table's.
    """
    num_heads, head_size = q.shape[2:]
    launch = launch or select_config(q.device, head_size, pieces is not None)
    num_work = slab.num_items * num_heads
    launch_kernel(
        _block_select_kernel,
        (min(len(scores), num_work),),
        q,
        mean,
        pieces,
        schedule.requests,
        schedule.items,
        lists,
        counts,
        scores,
        block_counts,
        schedule.counters,
        parts.rows if slab.part_tiles else None,
        q_scale,
        num_work,
        slab.first_item,
        parts.max_parts if slab.part_tiles else 0,
        slab.part_tiles,
        slab.list_slots * num_heads,
        softmax_scale * LOG2_E,
        _log2(config.alpha),
        _log2(config.candidate_alpha),
        *q.stride()[:3],
        scale_stride(q_scale),
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
        PIECES=0 if pieces is None else pieces.shape[2],
        BLOCK_PIECES=launch.block_pieces,
        NUM_STAGES=launch.num_stages,
        PIECE_STAGES=launch.piece_stages,
        ONE_LOOP=launch.one_loop,
        FP8_NATIVE=has_e4m3_instruction(q.device),
        num_warps=launch.num_warps,
        maxnreg=launch.max_registers,
    )


def _log2(x: float) -> float:
    return math.log2(x) if x > 0 else -math.inf


def score_scratch(
    q: torch.Tensor, schedule: Schedule, with_pieces: bool, workspace: Workspace | None = None
) -> torch.Tensor:
    """Scratch for `block_select`: one row of scores for each program that the GPU holds at once."""
    empty = (workspace or Workspace(q.device)).empty
    return empty((num_select_programs(q.device, q.shape[-1], with_pieces), schedule.max_key_blocks), torch.float32)
