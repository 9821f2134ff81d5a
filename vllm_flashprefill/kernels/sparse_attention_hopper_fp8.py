"""Stage 4 on Hopper with products in e4m3: queries, keys and values as codes, and probabilities rounded to them.

The kernel of `sparse_attention_hopper` but for three things. The tensor cores want e4m3 operands with what is summed
over side by side, so values come from `value_tiles`, which has transposed them. Probabilities are multiplied by 256, so
that few are below e4m3's least. And an accumulator of e4m3 products holds some 14 bits, so those of a few tiles are
added up in float32, in shared memory.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.descriptors import Matrix, descriptor
from vllm_flashprefill.kernels.fp8 import scale_stride
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Slab
from vllm_flashprefill.kernels.sparse_attention_hopper import (
    _TRITON_3_5,
    LOG2_E,
    STAGES,
    _producer,
    _producer_3_5,
    _scales,
    _store_half,
    _store_part,
    _tiles,
    box_rows,
    grid,
    layout_constants,
    numbers,
)
from vllm_flashprefill.kernels.sparse_attention_hopper_e4m3 import _barriers, codes_layout, given_scales
from vllm_flashprefill.key_values import KeyValues

# Probabilities are multiplied by 2 to this.
P_EXPONENT = gl.constexpr(8)

# Tiles whose products one accumulator adds up before they go to the sums in float32.
TILES_A_SUM = gl.constexpr(16)


@gluon.jit
def _operand(p, LAYOUT: gl.constexpr):
    """Probabilities, [ROWS, tokens] as float32 products left them, as an e4m3 operand.

    Of each 16 tokens a thread has 2t, 2t + 1, 2t + 8 and 2t + 9, and an operand wants 4t to 4t + 3 of it. So the
    operand has them in that order, which moves nothing, and values follow it.
    """
    ROWS: gl.constexpr = p.shape[0]
    GROUPS: gl.constexpr = p.shape[1] // 16
    p = gl.reshape(p.to(gl.float8e4nv), [ROWS, GROUPS, 2, 4, 2])
    p = gl.reshape(gl.permute(p, [0, 1, 3, 2, 4]), [ROWS, GROUPS * 16])
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def _thread_sums(p):
    """[ROWS, 4], the sums that the 4 threads which share a row have, each of its own columns."""
    p = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(p, axis=3), axis=1)


@gluon.jit
def _add_to_sums(sums, correction, p):
    layout: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return sums * gl.convert_layout(correction, layout)[:, None] + _thread_sums(p)


@gluon.jit
def _consumer(
    args,
    HALF: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    HAS_SINKS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """As `sparse_attention_hopper._consumer`. Registers hold the sums of some tiles, shared memory those before."""
    (
        out_ptr, requests_ptr, items_ptr, counts_ptr, parts_ptr, sums_ptr, sinks_ptr, scales, first_item, max_parts,
        base_scale, stride_ob, stride_ot, stride_oh, sums, shared,
    ) = args  # fmt: skip
    q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, _ = shared
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    offs_m = HALF * ROWS + gl.arange(0, ROWS, layout=row_layout)
    offs_n = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    sum_buffer = sums.index(HALF)

    done = 0
    step = 0
    mbarrier.wait(q_ready, 0)
    number = gl.sum(pair_buffer.load(one), axis=0)
    while number >= 0:
        pair, first_tile, num_tiles, part = _tiles(number, counts_ptr, parts_ptr, SPLIT)
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * columns.ITEM_COLUMNS
        request_ptr = requests_ptr + gl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
        query_block = gl.load(item_ptr + columns.QUERY_BLOCK)
        scale, v_scale = _scales(base_scale, scales, pair % NUM_HEADS // GROUP, True)
        q = q_buffers.index(HALF)

        # The query's own block, causal, or a later part's first one.
        slot = step % STAGES
        mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
        # [ROWS, BLOCK]
        s = warpgroup_mma(q, k_buffers.index(slot).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_free.index(slot), count=1)
        s = gl.where((first_tile * BLOCK + offs_m)[:, None] >= offs_n[None, :], s, float("-inf"))
        row_max = gl.max(s, axis=1) * scale
        # log2 of the probabilities.
        x = s * scale - (row_max - P_EXPONENT)[:, None]
        row_sum = _thread_sums(gl.zeros([ROWS, BLOCK], gl.float32, s_layout))
        # Of what is summed up so far, to the maximum that now is.
        correction = gl.full([ROWS], 1.0, gl.float32, row_layout)
        acc = gl.zeros([ROWS, HEAD_SIZE], gl.float32, acc_layout)
        sum_buffer.store(acc)
        # Triton would not carry it around the loop if it began as the same value as row_max.
        sum_max = row_max + 0.0

        # The rest: every row sees them whole, and all their tokens exist. A tile's scores run under the exponentials of
        # the one before, whose product with values runs under the maximum of these scores.
        for tile in range(1, num_tiles):
            v_slot = step % STAGES
            v_phase = step // STAGES & 1
            step += 1
            slot = step % STAGES
            mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
            s_run = warpgroup_mma(
                q, k_buffers.index(slot).permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
            )
            p = gl.exp2(x)
            row_sum = _add_to_sums(row_sum, correction, p)
            acc = acc * gl.convert_layout(correction, acc_row_layout)[:, None]
            if tile % TILES_A_SUM == 0:
                sum_correction = gl.convert_layout(gl.exp2(sum_max - row_max), acc_row_layout)[:, None]
                sum_buffer.store(sum_buffer.load(acc_layout) * sum_correction + acc)
                sum_max = row_max
                acc = gl.zeros([ROWS, HEAD_SIZE], gl.float32, acc_layout)
            p_run = _operand(p, p_layout)
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            acc_run = warpgroup_mma(
                p_run, v_buffers.index(v_slot).permute((1, 0)), warpgroup_mma_init(acc), is_async=True
            )
            s = warpgroup_mma_wait(1, deps=[s_run])
            mbarrier.arrive(k_free.index(slot), count=1)
            new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale)
            x = s * scale - (new_max - P_EXPONENT)[:, None]
            correction = gl.exp2(row_max - new_max)
            row_max = new_max
            # Already complete. Its branch keeps ptxas from waiting for the product before the maximum. Gluon cannot
            # wait with an operand of 8 bits, so p_run is not named; nothing writes its registers before the next round.
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            acc, x = warpgroup_mma_wait(0, deps=[acc_run, x])
            mbarrier.arrive(v_free.index(v_slot), count=1)

        mbarrier.arrive(q_free, count=1)
        p = gl.exp2(x)
        row_sum = _add_to_sums(row_sum, correction, p)
        acc = acc * gl.convert_layout(correction, acc_row_layout)[:, None]
        slot = step % STAGES
        mbarrier.wait(v_ready.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(_operand(p, p_layout), v_buffers.index(slot).permute((1, 0)), acc)
        mbarrier.arrive(v_free.index(slot), count=1)
        step += 1
        acc += sum_buffer.load(acc_layout) * gl.convert_layout(gl.exp2(sum_max - row_max), acc_row_layout)[:, None]
        total = gl.convert_layout(gl.sum(row_sum, axis=1), acc_row_layout)
        row_max = gl.convert_layout(row_max, acc_row_layout) - P_EXPONENT
        if HAS_SINKS:
            if part < 0:
                total += gl.exp2(gl.load(sinks_ptr + pair % NUM_HEADS).to(gl.float32) * LOG2_E - row_max)
        acc = acc * (v_scale / total)[:, None]
        if SPLIT:
            if part >= 0:
                _store_part(acc, row_max + gl.log2(total), sums_ptr, part, max_parts, HALF, BLOCK)
        _store_half(
            acc.to(out_ptr.dtype.element_ty), out_ptr, request_ptr, query_block, pair % NUM_HEADS, part, stride_ob,
            stride_ot, stride_oh, HALF, BLOCK,
        )  # fmt: skip

        done += 1
        mbarrier.wait(q_ready, done & 1)
        number = gl.sum(pair_buffer.load(one), axis=0)


@gluon.jit
def _second_consumer_3_5(consumer_args, producer_args):
    """Triton 3.5 gives every worker the arguments of all."""
    _consumer(*consumer_args)


@gluon.jit(
    do_not_specialize=[
        "first_item", "num_dense_items", "num_pairs", "max_parts", "q_rows_per_batch", "q_rows_per_head",
        "kv_rows_per_batch", "kv_rows_per_head", "stride_table", "num_mean_rows", "counters_ptr", "parts_ptr",
        "sinks_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "stride_q_scale", "stride_k_scale", "stride_v_scale",
    ]
)  # fmt: skip
def _sparse_attention_hopper_fp8_kernel(
    out_ptr, q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
    parts_ptr, sums_ptr, sinks_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, first_item, num_dense_items, num_pairs,
    max_parts, q_rows_per_batch, q_rows_per_head, kv_rows_per_batch, kv_rows_per_head, scale, stride_ob: gl.int64,
    stride_ot, stride_oh, stride_table, num_mean_rows, stride_q_scale, stride_k_scale, stride_v_scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, Q_COLUMNS: gl.constexpr, KV_COLUMNS: gl.constexpr,
    HAS_SINKS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    # Of the sums: 8 threads' rows lie in different banks.
    sum_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    codes: gl.constexpr = k_desc.dtype
    q_buffers = gl.allocate_shared_memory(codes, [2, BLOCK // 2, HEAD_SIZE], q_desc.layout)
    k_buffers = gl.allocate_shared_memory(codes, [STAGES, BLOCK, HEAD_SIZE], k_desc.layout)
    v_buffers = gl.allocate_shared_memory(codes, [STAGES, HEAD_SIZE, BLOCK], v_desc.layout)
    sums = gl.allocate_shared_memory(gl.float32, [2, BLOCK // 2, HEAD_SIZE], sum_layout)
    pair_buffer = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    k_ready = _barriers(1)
    k_free = _barriers(2)
    v_ready = _barriers(1)
    v_free = _barriers(2)
    fence_async_shared()

    # fmt: off
    scales = (q_scale_ptr, k_scale_ptr, v_scale_ptr, stride_q_scale, stride_k_scale, stride_v_scale)
    shared = (q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, 0)
    consume = (out_ptr, requests_ptr, items_ptr, counts_ptr, parts_ptr, sums_ptr, sinks_ptr, scales, first_item,
               max_parts, scale, stride_ob, stride_ot, stride_oh, sums, shared)
    produce = (q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
               parts_ptr, first_item, num_dense_items, num_pairs, max_parts, q_rows_per_batch, q_rows_per_head,
               kv_rows_per_batch, kv_rows_per_head, stride_table, num_mean_rows, shared)
    # A constant stays one only inside the call.
    if _TRITON_3_5:
        gl.warp_specialize(
            (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT),
            _consumer,
            ((consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT),
             (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
              gl.constexpr(True))),
            (_second_consumer_3_5, _producer_3_5), [4, 1], [240, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT)),
             (_consumer, (consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT)),
             (_producer, (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
                          gl.constexpr(True)))],
            [4, 1], [240, 24],
        )
    # fmt: on


def sparse_attention_hopper_fp8(
    q: torch.Tensor,
    kv: KeyValues,
    value_tiles: torch.Tensor,
    out: torch.Tensor,
    slab: Slab,
    most_parts: int,
    q_matrix: Matrix,
    matrix: Matrix,
    tables: tuple[torch.Tensor | None, ...],
    scale: float,
    sinks: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    **constants: int,
) -> None:
    """`sparse_attention` with products in e4m3.

    Args:
        q: e4m3 codes (uint8).
        value_tiles: of `value_tiles.value_tiles`.
        q_scale: as of `sparse_attention`.
        The others: as of `sparse_attention_hopper.sparse_attention_hopper`.
    """
    head_size = q.shape[3]
    q, k, tiles = (x.view(torch.float8_e4m3fn) for x in (q, kv.k, value_tiles.view(-1, BLOCK_SIZE)))
    tile_matrix = Matrix(tuple(tiles.shape), tiles.stride(), len(tiles), 0, 0)
    layout = codes_layout(head_size)
    box = box_rows(kv.page_size, BLOCK_SIZE)
    scales = given_scales(q, q_scale, kv.k_scale, kv.v_scale)
    launch_kernel(
        _sparse_attention_hopper_fp8_kernel,
        grid(q, slab, most_parts),
        out,
        descriptor(q, q_matrix, (BLOCK_SIZE // 2, head_size), layout),
        descriptor(k, matrix, (box, head_size), layout),
        descriptor(tiles, tile_matrix, (head_size, BLOCK_SIZE), codes_layout(BLOCK_SIZE)),
        *tables,
        out if sinks is None else sinks,
        *scales,
        *numbers(kv, out, slab, most_parts, q_matrix, matrix, scale),
        value_tiles.shape[1],
        *(scale_stride(x) for x in scales),
        **layout_constants(kv, q_matrix, matrix, sinks),
        **constants,
    )
