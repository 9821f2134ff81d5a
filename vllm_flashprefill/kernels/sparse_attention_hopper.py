"""Stage 4 on Hopper, in Gluon: one warp loads tiles, two warpgroups attend to half a query block each.

A tile is a whole key block, brought by the tensor copy engine, page by page, into one of two buffers. Each warpgroup
issues the scores of the next tile and the values' product of this one together and takes the softmax of the former
while the latter runs; the other warpgroup's products fill the tensor cores meanwhile. Programs stay on their
multiprocessor and take (query block, head) pairs from a counter, so the loads of the next pair run under the end of
this one.

The query's own block is a pair's first tile, since it alone needs a mask.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import num_multiprocessors
from vllm_flashprefill.kernels.descriptors import Matrix, descriptor
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Slab
from vllm_flashprefill.key_values import KeyValues

# Triton 3.5 takes the default partition, the workers and their arguments apart.
_TRITON_3_5 = gl.constexpr("default_partition" in inspect.signature(gl.warp_specialize).parameters)

# Triton 3.7 to 3.9 gave these other names.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

STAGES = gl.constexpr(2)
LOG2_E = gl.constexpr(math.log2(math.e))

# Of the numbers by which the warps know their work, the first one of a part.
FIRST_PART = gl.constexpr(1 << 30)

# Columns of a swizzled row, 128 bytes.
PANEL = 64


def box_rows(page_size: int, block_size: int) -> int:
    """Rows of k and v that one copy brings: a part of a page that is a part of a block; page_size 0 for no pages."""
    return math.gcd(page_size, block_size)


@functools.cache
def tile_layout(element_size: int) -> gl.NVMMASharedLayout:
    """How a tile of q, k or v lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * element_size, rank=2)


@gluon.jit
def _pair(work, num_dense_items, num_pairs, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """The pair (item, head) of a place in the order of work: past the dense items, one KV head's query blocks after
    another's, so that they share keys in the L2 cache."""
    num_dense = num_dense_items * NUM_HEADS
    if work >= num_dense:
        per_kv_head = (num_pairs - num_dense) // (NUM_HEADS // GROUP)
        within = (work - num_dense) % per_kv_head
        work = num_dense + (work - num_dense) // per_kv_head * GROUP + within % GROUP + within // GROUP * NUM_HEADS
    return work


@gluon.jit
def _number(
    work, num_parts, num_dense_items, num_pairs, parts_ptr, max_parts,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """What is at a place in the order of work, parts of split lists first: a pair whose list is whole, FIRST_PART and
    more for a part, -1 for nothing."""
    number = -1
    if SPLIT:
        if work < num_parts:
            if gl.load(parts_ptr + work * columns.PART_COLUMNS + columns.PAIR) >= 0:
                number = FIRST_PART + work
        else:
            pair = _pair(work - num_parts, num_dense_items, num_pairs, NUM_HEADS, GROUP)
            if gl.load(parts_ptr + max_parts * columns.PART_COLUMNS + pair) < 0:
                number = pair
    else:
        number = _pair(work, num_dense_items, num_pairs, NUM_HEADS, GROUP)
    return number


@gluon.jit
def _tiles(number, counts_ptr, parts_ptr, SPLIT: gl.constexpr):
    """(pair, its first tile, tiles from there, part or -1) of a number from `_number`."""
    pair = number
    first_tile = 0
    part = -1
    if SPLIT:
        if number >= FIRST_PART:
            part = number - FIRST_PART
            row_ptr = parts_ptr + part * columns.PART_COLUMNS
            pair = gl.load(row_ptr + columns.PAIR)
            first_tile = gl.load(row_ptr + columns.FIRST_TILE)
            num_tiles = gl.load(row_ptr + columns.NUM_TILES)
        else:
            num_tiles = gl.load(counts_ptr + pair)
    else:
        num_tiles = gl.load(counts_ptr + pair)
    return pair, first_tile, num_tiles, part


@gluon.jit
def _tile_block(list_ptr, tile, query_block):
    """The key block of a tile. Tile 0 is the query's own block, tile t the list's entry t - 1."""
    block = query_block
    if tile > 0:
        block = gl.load(list_ptr + tile - 1)
    return block


@gluon.jit
def _box_rows(
    block, table_row_ptr, first_row, rows_per_page, seq_len,
    BLOCK: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """First rows, in k and v as matrices, of a block's boxes; a box that starts past the sequence gets page 0."""
    # Triton unpacks no tuples.
    rows = ()
    for n in gl.static_range(BLOCK // BOX):
        token = block * BLOCK + n * BOX
        if PAGE_SIZE > 0:
            page = gl.load(table_row_ptr + token // PAGE_SIZE, mask=token < seq_len, other=0)
            rows = rows + (first_row + page * rows_per_page + token % PAGE_SIZE,)  # noqa: RUF005
        else:
            rows = rows + (first_row + token,)  # noqa: RUF005
    return rows


@gluon.jit
def _copy_tile(desc, rows, column, ready, buffer, BLOCK: gl.constexpr, BOX: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Bring a tile's boxes, [BOX, PANEL] each, to their places in it: panels of columns lie one after another."""
    PANEL: gl.constexpr = desc.block_type.shape[1]
    gl.static_assert(desc.block_type.shape[0] == BOX)
    panels = _reinterpret(buffer, buffer.dtype, [HEAD_SIZE // PANEL * BLOCK, PANEL], buffer.layout)
    mbarrier.expect(ready, BLOCK * HEAD_SIZE * buffer.dtype.primitive_bitwidth // 8)
    for n in gl.static_range(BLOCK // BOX):
        for panel in gl.static_range(HEAD_SIZE // PANEL):
            place = panels.slice(panel * BLOCK + n * BOX, BOX, dim=0)
            _async_load(desc, [rows[n], column + panel * PANEL], ready, place)


@gluon.jit
def _producer(
    args,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, Q_COLUMNS: gl.constexpr, KV_COLUMNS: gl.constexpr,
    SPLIT: gl.constexpr, V_BY_BLOCK: gl.constexpr,
):  # fmt: skip
    """V_BY_BLOCK: values lie block by block, [KV heads, num_mean_rows, HEAD_SIZE, BLOCK], in place of pages."""
    (
        q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
        parts_ptr, first_item, num_dense_items, num_pairs, max_parts, q_rows_per_batch, q_rows_per_head,
        kv_rows_per_batch, kv_rows_per_head, stride_table, num_mean_rows, shared,
    ) = args  # fmt: skip
    q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, _ = shared
    q_bytes: gl.constexpr = 2 * q_desc.block_type.nbytes
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_parts = 0
    if SPLIT:
        num_parts = gl.minimum(gl.load(counters_ptr + columns.NUM_PARTS), max_parts)
    num_work = num_parts + num_pairs
    work = gl.program_id(0)
    done = 0
    step = 0
    while work < num_work:
        number = _number(work, num_parts, num_dense_items, num_pairs, parts_ptr, max_parts, NUM_HEADS, GROUP, SPLIT)
        if number >= 0:
            pair, first_tile, num_tiles, _part = _tiles(number, counts_ptr, parts_ptr, SPLIT)
            head = pair % NUM_HEADS
            kv_head = head // GROUP
            column = kv_head * KV_COLUMNS
            item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * columns.ITEM_COLUMNS
            request_ptr = requests_ptr + gl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
            query_block = gl.load(item_ptr + columns.QUERY_BLOCK)
            list_slot = gl.load(item_ptr + columns.LIST_SLOT).to(gl.int64)
            list_ptr = lists_ptr + list_slot * NUM_HEADS + head.to(gl.int64) * (query_block + 1)
            batch = gl.load(request_ptr + columns.BATCH)
            mean_start = gl.load(request_ptr + columns.MEAN_START)
            table_row_ptr = block_table_ptr
            first_row = kv_head * kv_rows_per_head
            if PAGE_SIZE > 0:
                table_row_ptr += gl.load(request_ptr + columns.TABLE_ROW).to(gl.int64) * stride_table
            else:
                first_row += batch * kv_rows_per_batch + gl.load(request_ptr + columns.KV_START)
            context_len = gl.load(request_ptr + columns.CONTEXT_LEN)
            seq_len = context_len + gl.load(request_ptr + columns.QUERY_LEN)
            # May lie before or past the chunk's rows: what is loaded there is never stored.
            q_row = batch * q_rows_per_batch + head * q_rows_per_head + gl.load(request_ptr + columns.QUERY_START)
            q_row += query_block * BLOCK - context_len

            mbarrier.wait(q_free, (done + 1) & 1)
            pair_buffer.store(gl.full([1], number, gl.int32, one))
            _barrier()
            mbarrier.expect(q_ready, q_bytes)
            _async_load(q_desc, [q_row, head * Q_COLUMNS], q_ready, q_buffers.index(0))
            _async_load(q_desc, [q_row + BLOCK // 2, head * Q_COLUMNS], q_ready, q_buffers.index(1))

            # Keys of a tile, then values of the one before: the order in which they are needed.
            # Triton would not carry v_block around the loop if it began as the same value as k_block.
            v_block = 0
            k_block = _tile_block(list_ptr, first_tile, query_block)
            for tile in range(0, num_tiles + 1):
                if tile < num_tiles:
                    slot = step % STAGES
                    rows = _box_rows(
                        k_block, table_row_ptr, first_row, kv_rows_per_batch, seq_len, BLOCK, BOX, PAGE_SIZE
                    )
                    mbarrier.wait(k_free.index(slot), (step // STAGES + 1) & 1)
                    _copy_tile(k_desc, rows, column, k_ready.index(slot), k_buffers.index(slot), BLOCK, BOX, HEAD_SIZE)
                next_block = k_block
                if tile + 1 < num_tiles:
                    next_block = _tile_block(list_ptr, first_tile + tile + 1, query_block)
                if tile > 0:
                    slot = (step - 1) % STAGES
                    v_buffer, v_barrier = v_buffers.index(slot), v_ready.index(slot)
                    if V_BY_BLOCK:
                        v_row = (kv_head * num_mean_rows + mean_start + v_block) * HEAD_SIZE
                        mbarrier.wait(v_free.index(slot), ((step - 1) // STAGES + 1) & 1)
                        _copy_tile(v_desc, (v_row,), 0, v_barrier, v_buffer, HEAD_SIZE, HEAD_SIZE, BLOCK)
                    else:
                        rows = _box_rows(
                            v_block, table_row_ptr, first_row, kv_rows_per_batch, seq_len, BLOCK, BOX, PAGE_SIZE
                        )
                        mbarrier.wait(v_free.index(slot), ((step - 1) // STAGES + 1) & 1)
                        _copy_tile(v_desc, rows, column, v_barrier, v_buffer, BLOCK, BOX, HEAD_SIZE)
                v_block = k_block
                k_block = next_block
                step += 1
            step -= 1
            done += 1

        # Every program asks once in vain; the last to ask leaves the counter as it found it.
        asked = gl.atomic_add(counters_ptr + columns.NEXT_WORK, 1)
        if asked == num_work - 1:
            gl.store(counters_ptr + columns.NEXT_WORK, 0)
        work = asked + gl.num_programs(0)
    mbarrier.wait(q_free, (done + 1) & 1)
    pair_buffer.store(gl.full([1], -1, gl.int32, one))
    _barrier()
    mbarrier.arrive(q_ready, count=1)


@gluon.jit
def _scales(scale, scales, kv_head, FROM_E4M3: gl.constexpr):
    """What the logits of a KV head's queries and what its values are multiplied by."""
    v_scale = 1.0
    if FROM_E4M3:
        q_scale_ptr, k_scale_ptr, v_scale_ptr, stride_q_scale, stride_k_scale, stride_v_scale = scales
        scale *= gl.load(q_scale_ptr + kv_head * stride_q_scale) * gl.load(k_scale_ptr + kv_head * stride_k_scale)
        v_scale = gl.load(v_scale_ptr + kv_head * stride_v_scale)
    return scale, v_scale


@gluon.jit
def _store_half(
    out, out_ptr, request_ptr, query_block, head, part, stride_ob, stride_ot, stride_oh,
    HALF: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's rows of a query block, as far as they are the chunk's; none of a part."""
    ROWS: gl.constexpr = BLOCK // 2
    query_len = gl.load(request_ptr + columns.QUERY_LEN)
    rows = query_block * BLOCK + HALF * ROWS - gl.load(request_ptr + columns.CONTEXT_LEN)
    rows += gl.arange(0, ROWS, layout=gl.SliceLayout(1, out.type.layout))
    offs_rows = (gl.load(request_ptr + columns.QUERY_START) + rows).to(gl.int64)
    offs_dim = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, out.type.layout))
    batch = gl.load(request_ptr + columns.BATCH).to(gl.int64)
    out_ptrs = out_ptr + batch * stride_ob + head.to(gl.int64) * stride_oh
    out_ptrs = out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :]
    gl.store(out_ptrs, out, mask=((rows >= 0) & (rows < query_len) & (part < 0))[:, None])


@gluon.jit
def _store_part(out, lse, sums_ptr, part, max_parts, HALF: gl.constexpr, BLOCK: gl.constexpr):
    """Write a warpgroup's rows of a part, and the logarithms of their exponentials' sums."""
    ROWS: gl.constexpr = BLOCK // 2
    HEAD_SIZE: gl.constexpr = out.shape[1]
    offs_dim = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, out.type.layout))
    offs_m = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out.type.layout))
    sum_ptrs = sums_ptr + part.to(gl.int64) * (BLOCK * HEAD_SIZE) + offs_m[:, None] * HEAD_SIZE
    gl.store(sum_ptrs + offs_dim[None, :], out)
    offs_m = HALF * ROWS + gl.arange(0, ROWS, layout=lse.type.layout)
    gl.store(sums_ptr + max_parts.to(gl.int64) * (BLOCK * HEAD_SIZE) + part * BLOCK + offs_m, lse)


@gluon.jit
def _consumer(
    args,
    HALF: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    HAS_SINKS: gl.constexpr, SPLIT: gl.constexpr, FROM_E4M3: gl.constexpr,
):  # fmt: skip
    """FROM_E4M3: keys and values were codes, which have scales, and of which whoever widened them cleared what is no
    token's."""
    (
        out_ptr, requests_ptr, items_ptr, counts_ptr, parts_ptr, sums_ptr, sinks_ptr, scales, first_item, max_parts,
        base_scale, stride_ob, stride_ot, stride_oh, shared,
    ) = args  # fmt: skip
    q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, v_clean = shared
    ROWS: gl.constexpr = BLOCK // 2
    dtype: gl.constexpr = k_buffers.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_buffer = q_buffers.index(HALF)
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    offs_m = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    offs_n = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))

    done = 0
    step = 0
    cleaned = 0
    mbarrier.wait(q_ready, 0)
    number = gl.sum(pair_buffer.load(one), axis=0)
    while number >= 0:
        pair, first_tile, num_tiles, part = _tiles(number, counts_ptr, parts_ptr, SPLIT)
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * columns.ITEM_COLUMNS
        request_ptr = requests_ptr + gl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
        query_block = gl.load(item_ptr + columns.QUERY_BLOCK)
        seq_len = gl.load(request_ptr + columns.QUERY_LEN) + gl.load(request_ptr + columns.CONTEXT_LEN)
        scale, v_scale = _scales(base_scale, scales, pair % NUM_HEADS // GROUP, FROM_E4M3)

        # The query's own block, causal, or a later part's first one.
        slot = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_ready.index(slot), phase)
        # [ROWS, BLOCK]
        s = warpgroup_mma(q_buffer, k_buffers.index(slot).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_free.index(slot), count=1)
        s = gl.where((first_tile * BLOCK + offs_m)[:, None] >= offs_n[None, :], s, float("-inf"))
        row_max = gl.max(s, axis=1) * scale
        p = gl.exp2(s * scale - row_max[:, None])
        row_sum = gl.sum(p, axis=1)
        acc = gl.zeros([ROWS, HEAD_SIZE], gl.float32, acc_layout)
        # Its tokens may end within it: what lies behind them may be NaN. Each warpgroup clears its half.
        if not FROM_E4M3:
            if first_tile == 0:
                if (query_block + 1) * BLOCK > seq_len:
                    mbarrier.wait(v_ready.index(slot), phase)
                    v_half = v_buffers.index(slot).slice(HALF * ROWS, ROWS, dim=0)
                    tokens = query_block * BLOCK + HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, io_layout))
                    v = v_half.load(io_layout)
                    v_half.store(gl.where((tokens < seq_len)[:, None], v, 0.0).to(dtype))
                    fence_async_shared()
                    mbarrier.arrive(v_clean, count=1)
                    mbarrier.wait(v_clean, cleaned & 1)
                    cleaned += 1

        # The rest: every row sees them whole, and all their tokens exist.
        for _tile in range(1, num_tiles):
            v_slot = step % STAGES
            v_phase = step // STAGES & 1
            step += 1
            slot = step % STAGES
            phase = step // STAGES & 1
            p_run = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(k_ready.index(slot), phase)
            s_run = warpgroup_mma(
                q_buffer, k_buffers.index(slot).permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
            )
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            acc_run = warpgroup_mma(p_run, v_buffers.index(v_slot), warpgroup_mma_init(acc), is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_run])
            mbarrier.arrive(k_free.index(slot), count=1)
            new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale)
            p = gl.exp2(s * scale - new_max[:, None])
            correction = gl.exp2(row_max - new_max)
            row_sum = row_sum * correction + gl.sum(p, axis=1)
            row_max = new_max
            # Already complete. Its branch keeps ptxas from waiting for the product before the softmax.
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            acc, _, p = warpgroup_mma_wait(0, deps=[acc_run, p_run, p])
            mbarrier.arrive(v_free.index(v_slot), count=1)
            acc = acc * gl.convert_layout(correction, acc_row_layout)[:, None]

        mbarrier.arrive(q_free, count=1)
        slot = step % STAGES
        mbarrier.wait(v_ready.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_buffers.index(slot), acc)
        mbarrier.arrive(v_free.index(slot), count=1)
        step += 1
        if HAS_SINKS:
            if part < 0:
                row_sum += gl.exp2(gl.load(sinks_ptr + pair % NUM_HEADS).to(gl.float32) * LOG2_E - row_max)
        acc = acc * gl.convert_layout(v_scale / row_sum, acc_row_layout)[:, None]
        if SPLIT:
            if part >= 0:
                _store_part(acc, row_max + gl.log2(row_sum), sums_ptr, part, max_parts, HALF, BLOCK)
        out = acc.to(out_ptr.dtype.element_ty)
        if not FROM_E4M3:
            # Whole rows of it; beside codes there is no shared memory left for that.
            out = gl.convert_layout(out, io_layout)
        _store_half(
            out, out_ptr, request_ptr, query_block, pair % NUM_HEADS, part, stride_ob, stride_ot, stride_oh, HALF, BLOCK
        )  # fmt: skip

        done += 1
        mbarrier.wait(q_ready, done & 1)
        number = gl.sum(pair_buffer.load(one), axis=0)


@gluon.jit
def _second_consumer_3_5(consumer_args, producer_args):
    """Triton 3.5 gives every worker the arguments of all."""
    _consumer(*consumer_args)


@gluon.jit
def _producer_3_5(consumer_args, producer_args):
    _producer(*producer_args)


@gluon.jit(
    do_not_specialize=[
        "first_item", "num_dense_items", "num_pairs", "max_parts", "q_rows_per_batch", "q_rows_per_head",
        "kv_rows_per_batch", "kv_rows_per_head", "stride_table", "counters_ptr", "parts_ptr", "sinks_ptr",
    ]
)  # fmt: skip
def _sparse_attention_hopper_kernel(
    out_ptr, q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
    parts_ptr, sums_ptr, sinks_ptr, first_item, num_dense_items, num_pairs, max_parts, q_rows_per_batch,
    q_rows_per_head, kv_rows_per_batch, kv_rows_per_head, scale, stride_ob: gl.int64, stride_ot, stride_oh,
    stride_table,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, Q_COLUMNS: gl.constexpr, KV_COLUMNS: gl.constexpr,
    HAS_SINKS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    q_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK // 2, HEAD_SIZE], q_desc.layout)
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_SIZE], q_desc.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_SIZE], q_desc.layout)
    pair_buffer = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    mbarrier.init(v_clean, count=2)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(k_free.index(n), count=2)
        mbarrier.init(v_ready.index(n), count=1)
        mbarrier.init(v_free.index(n), count=2)
    fence_async_shared()

    # fmt: off
    shared = (q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, v_clean)
    consume = (out_ptr, requests_ptr, items_ptr, counts_ptr, parts_ptr, sums_ptr, sinks_ptr, (), first_item, max_parts,
               scale, stride_ob, stride_ot, stride_oh, shared)
    produce = (q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
               parts_ptr, first_item, num_dense_items, num_pairs, max_parts, q_rows_per_batch, q_rows_per_head,
               kv_rows_per_batch, kv_rows_per_head, stride_table, 0, shared)
    # A constant stays one only inside the call.
    if _TRITON_3_5:
        gl.warp_specialize(
            (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT, gl.constexpr(False)),
            _consumer,
            ((consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT, gl.constexpr(False)),
             (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
              gl.constexpr(False))),
            (_second_consumer_3_5, _producer_3_5), [4, 1], [240, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT,
                          gl.constexpr(False))),
             (_consumer, (consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT,
                          gl.constexpr(False))),
             (_producer, (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
                          gl.constexpr(False)))],
            [4, 1], [240, 24],
        )
    # fmt: on


def grid(q: torch.Tensor, slab: Slab, most_parts: int) -> tuple[int]:
    """A program for each multiprocessor, as far as there are pairs and there may be parts."""
    return (min(slab.num_items * q.shape[2] + most_parts, num_multiprocessors(q.device)),)


def numbers(
    kv: KeyValues, out: torch.Tensor, slab: Slab, most_parts: int, q_matrix: Matrix, matrix: Matrix, scale: float
) -> tuple[int | float, ...]:
    """The kernels' arguments from first_item to stride_table."""
    return (
        slab.first_item,
        slab.num_dense_items,
        slab.num_items * out.shape[2],
        most_parts,
        q_matrix.rows_per_batch,
        q_matrix.rows_per_head,
        matrix.rows_per_batch,
        matrix.rows_per_head,
        scale,
        *out.stride()[:3],
        kv.table_stride,
    )


def layout_constants(kv: KeyValues, q_matrix: Matrix, matrix: Matrix, sinks: torch.Tensor | None) -> dict[str, int]:
    """The kernels' constants that `sparse_attention` does not give."""
    return dict(
        BOX=box_rows(kv.page_size, BLOCK_SIZE),
        Q_COLUMNS=q_matrix.columns_per_head,
        KV_COLUMNS=matrix.columns_per_head,
        HAS_SINKS=sinks is not None,
    )


def sparse_attention_hopper(
    q: torch.Tensor,
    kv: KeyValues,
    out: torch.Tensor,
    slab: Slab,
    most_parts: int,
    q_matrix: Matrix,
    matrix: Matrix,
    tables: tuple[torch.Tensor | None, ...],
    scale: float,
    sinks: torch.Tensor | None,
    **constants: int,
) -> None:
    """`sparse_attention` by this kernel.

    Args:
        most_parts: parts that there is room for, 0 where no list is split.
        q_matrix, matrix: how q, and k and v alike, lie as matrices.
        tables: the kernel's arguments from block_table_ptr to sums_ptr.
        scale, sinks, constants: its arguments that `_sparse_attention_kernel` has too.
    """
    layout, box = tile_layout(kv.k.element_size()), box_rows(kv.page_size, BLOCK_SIZE)
    launch_kernel(
        _sparse_attention_hopper_kernel,
        grid(q, slab, most_parts),
        out,
        # A warpgroup's half of a query block.
        descriptor(q, q_matrix, (BLOCK_SIZE // 2, q.shape[3]), layout),
        descriptor(kv.k, matrix, (box, PANEL), layout),
        descriptor(kv.v, matrix, (box, PANEL), layout),
        *tables,
        # The kernel reads it only where there are sinks.
        out if sinks is None else sinks,
        *numbers(kv, out, slab, most_parts, q_matrix, matrix, scale),
        **layout_constants(kv, q_matrix, matrix, sinks),
        **constants,
    )
