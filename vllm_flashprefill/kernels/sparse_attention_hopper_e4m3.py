"""Stage 4 on Hopper over an e4m3 cache: the kernel of `sparse_attention_hopper`, with a warpgroup that widens.

Tiles arrive as codes. A third warpgroup makes float16 of them, which holds each exactly, in the buffers that the other
two multiply.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.descriptors import Matrix, descriptor
from vllm_flashprefill.kernels.fp8 import scale_stride
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Slab
from vllm_flashprefill.kernels.sparse_attention_hopper import (
    _TRITON_3_5,
    STAGES,
    _barrier,
    _consumer,
    _producer,
    _reinterpret,
    _tiles,
    box_rows,
    grid,
    layout_constants,
    numbers,
    tile_layout,
)
from vllm_flashprefill.key_values import KeyValues, is_e4m3

# Of a tile, that the warpgroup which widens holds in its registers.
ROWS_AT_ONCE = gl.constexpr(32)


@gluon.jit
def _clear_past(codes, first_token, seq_len, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """Zero a tile's rows that are behind the sequence's last token; they may be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    zero = gl.zeros([ROWS_AT_ONCE, HEAD_SIZE], gl.float32, layout).to(codes.dtype)
    for part in gl.static_range(BLOCK // ROWS_AT_ONCE):
        rows = codes.slice(part * ROWS_AT_ONCE, ROWS_AT_ONCE, dim=0)
        tokens = part * ROWS_AT_ONCE + gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, layout))
        rows.store(gl.where((first_token + tokens < seq_len)[:, None], rows.load(layout), zero))
    fence_async_shared()
    _barrier()


@gluon.jit
def _widen(codes, wide, ready, taken, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """A tile of codes into one of float16, some rows at a time: this warpgroup has few registers.

    Arrives at the barriers that say so: the tile is ready, its codes are taken.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    for part in gl.static_range(BLOCK // ROWS_AT_ONCE):
        x = codes.slice(part * ROWS_AT_ONCE, ROWS_AT_ONCE, dim=0).load(layout)
        wide.slice(part * ROWS_AT_ONCE, ROWS_AT_ONCE, dim=0).store(x.to(gl.float16))
    fence_async_shared()
    _barrier()
    mbarrier.arrive(ready, count=1)
    mbarrier.arrive(taken, count=1)


@gluon.jit
def _widener(args, NUM_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr, SPLIT: gl.constexpr):
    """Queries, keys and values into float16: codes, and queries that are in 16 bits, which are clamped to its range."""
    requests_ptr, items_ptr, counts_ptr, parts_ptr, first_item, staged, shared = args
    q_staged, k_codes, v_codes, _, q_here, _, k_here, k_taken, v_here, v_taken, _ = staged
    q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, _, k_ready, k_free, v_ready, v_free, _ = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    done = 0
    step = 0
    mbarrier.wait(q_here, 0)
    number = gl.sum(pair_buffer.load(one), axis=0)
    while number >= 0:
        pair, first_tile, num_tiles, _part = _tiles(number, counts_ptr, parts_ptr, SPLIT)
        item_ptr = items_ptr + (first_item + pair // NUM_HEADS) * columns.ITEM_COLUMNS
        request_ptr = requests_ptr + gl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
        query_block = gl.load(item_ptr + columns.QUERY_BLOCK)
        seq_len = gl.load(request_ptr + columns.QUERY_LEN) + gl.load(request_ptr + columns.CONTEXT_LEN)
        # Codes lie in the second half of the buffer that they are widened into: the first of them go first, and all
        # that lie where a part goes are read before it is written.
        for half in gl.static_range(2):
            for part in gl.static_range(BLOCK // 2 // ROWS_AT_ONCE):
                q = q_staged.index(half).slice(part * ROWS_AT_ONCE, ROWS_AT_ONCE, dim=0).load(layout)
                if q_staged.dtype != gl.float8e4nv:
                    q = gl.minimum(gl.maximum(q.to(gl.float32), -65504.0), 65504.0)
                _barrier()
                q_buffers.index(half).slice(part * ROWS_AT_ONCE, ROWS_AT_ONCE, dim=0).store(q.to(gl.float16))
        fence_async_shared()
        _barrier()
        mbarrier.arrive(q_ready, count=1)

        for tile in range(0, num_tiles + 1):
            if tile < num_tiles:
                slot = step % STAGES
                phase = step // STAGES & 1
                mbarrier.wait(k_here.index(slot), phase)
                mbarrier.wait(k_free.index(slot), phase ^ 1)
                k_barriers = k_ready.index(slot), k_taken.index(slot)
                _widen(k_codes.index(slot), k_buffers.index(slot), *k_barriers, HEAD_SIZE, BLOCK)
            if tile > 0:
                slot = (step - 1) % STAGES
                phase = (step - 1) // STAGES & 1
                mbarrier.wait(v_here.index(slot), phase)
                if first_tile + tile == 1:
                    if (query_block + 1) * BLOCK > seq_len:
                        _clear_past(v_codes.index(slot), query_block * BLOCK, seq_len, HEAD_SIZE, BLOCK)
                mbarrier.wait(v_free.index(slot), phase ^ 1)
                v_barriers = v_ready.index(slot), v_taken.index(slot)
                _widen(v_codes.index(slot), v_buffers.index(slot), *v_barriers, HEAD_SIZE, BLOCK)
            step += 1
        step -= 1
        done += 1
        mbarrier.wait(q_here, done & 1)
        number = gl.sum(pair_buffer.load(one), axis=0)
    mbarrier.arrive(q_ready, count=1)


# Triton 3.5 gives every worker the arguments of all.
@gluon.jit
def _consumer_3_5(consumer_args, converter_args, producer_args):
    _consumer(*consumer_args)


@gluon.jit
def _widener_3_5(consumer_args, converter_args, producer_args):
    _widener(*converter_args)


@gluon.jit
def _producer_3_5(consumer_args, converter_args, producer_args):
    _producer(*producer_args)


@gluon.jit
def _barriers(ARRIVALS: gl.constexpr):
    """A barrier for each stage."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(barriers.index(n), count=ARRIVALS)
    return barriers


@gluon.jit(
    do_not_specialize=[
        "first_item", "num_dense_items", "num_pairs", "max_parts", "q_rows_per_batch", "q_rows_per_head",
        "kv_rows_per_batch", "kv_rows_per_head", "stride_table", "counters_ptr", "parts_ptr", "sinks_ptr",
        "q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "stride_q_scale", "stride_k_scale", "stride_v_scale",
    ]
)  # fmt: skip
def _sparse_attention_hopper_e4m3_kernel(
    out_ptr, q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
    parts_ptr, sums_ptr, sinks_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, first_item, num_dense_items, num_pairs,
    max_parts, q_rows_per_batch, q_rows_per_head, kv_rows_per_batch, kv_rows_per_head, scale, stride_ob: gl.int64,
    stride_ot, stride_oh, stride_table, stride_q_scale, stride_k_scale, stride_v_scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, BLOCK: gl.constexpr,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, Q_COLUMNS: gl.constexpr, KV_COLUMNS: gl.constexpr,
    HAS_SINKS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    wide_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    codes: gl.constexpr = k_desc.dtype
    q_buffers = gl.allocate_shared_memory(gl.float16, [2, BLOCK // 2, HEAD_SIZE], wide_layout)
    k_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK, HEAD_SIZE], wide_layout)
    v_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK, HEAD_SIZE], wide_layout)
    k_codes = gl.allocate_shared_memory(codes, [STAGES, BLOCK, HEAD_SIZE], k_desc.layout)
    v_codes = gl.allocate_shared_memory(codes, [STAGES, BLOCK, HEAD_SIZE], k_desc.layout)
    if q_desc.dtype == codes:
        q_codes = _reinterpret(q_buffers.index(1), codes, [2, BLOCK // 2, HEAD_SIZE], q_desc.layout)
    else:
        q_codes = _reinterpret(q_buffers, q_desc.dtype, [2, BLOCK // 2, HEAD_SIZE], q_desc.layout)
    pair_buffer = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # What the loading warp brings is here until it is taken; what is made of it is ready until it is free.
    q_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_here, count=1)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    k_here = _barriers(1)
    k_taken = _barriers(1)
    k_ready = _barriers(1)
    k_free = _barriers(2)
    v_here = _barriers(1)
    v_taken = _barriers(1)
    v_ready = _barriers(1)
    v_free = _barriers(2)
    fence_async_shared()

    # fmt: off
    scales = (q_scale_ptr, k_scale_ptr, v_scale_ptr, stride_q_scale, stride_k_scale, stride_v_scale)
    shared = (q_buffers, k_buffers, v_buffers, pair_buffer, q_ready, q_free, k_ready, k_free, v_ready, v_free, 0)
    arrived = (q_codes, k_codes, v_codes, pair_buffer, q_here, q_free, k_here, k_taken, v_here, v_taken, 0)
    consume = (out_ptr, requests_ptr, items_ptr, counts_ptr, parts_ptr, sums_ptr, sinks_ptr, scales, first_item,
               max_parts, scale, stride_ob, stride_ot, stride_oh, shared)
    widen = (requests_ptr, items_ptr, counts_ptr, parts_ptr, first_item, arrived, shared)
    produce = (q_desc, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr, counters_ptr,
               parts_ptr, first_item, num_dense_items, num_pairs, max_parts, q_rows_per_batch, q_rows_per_head,
               kv_rows_per_batch, kv_rows_per_head, stride_table, 0, arrived)
    # A constant stays one only inside the call.
    if _TRITON_3_5:
        gl.warp_specialize(
            (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT, gl.constexpr(True)),
            _consumer,
            ((consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT, gl.constexpr(True)),
             (widen, NUM_HEADS, HEAD_SIZE, BLOCK, SPLIT),
             (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
              gl.constexpr(False))),
            (_consumer_3_5, _widener_3_5, _producer_3_5), [4, 4, 1], [232, 24, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (consume, gl.constexpr(0), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT,
                          gl.constexpr(True))),
             (_consumer, (consume, gl.constexpr(1), NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, HAS_SINKS, SPLIT,
                          gl.constexpr(True))),
             (_widener, (widen, NUM_HEADS, HEAD_SIZE, BLOCK, SPLIT)),
             (_producer, (produce, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK, BOX, PAGE_SIZE, Q_COLUMNS, KV_COLUMNS, SPLIT,
                          gl.constexpr(False)))],
            [4, 4, 1], [232, 24, 24],
        )
    # fmt: on


@functools.cache
def codes_layout(columns_of_a_row: int) -> gl.NVMMASharedLayout:
    """How a tile of codes lies in shared memory, its rows of 64 or 128."""
    return gl.NVMMASharedLayout(swizzle_byte_width=columns_of_a_row, element_bitwidth=8, rank=2)


def given_scales(q: torch.Tensor, *scales: torch.Tensor | None) -> list[torch.Tensor]:
    """Scales for the kernel, which reads one of each; vLLM gives them all."""
    return [q.new_ones(1, dtype=torch.float32) if scale is None else scale for scale in scales]


def sparse_attention_hopper_e4m3(
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
    q_scale: torch.Tensor | None,
    **constants: int,
) -> None:
    """`sparse_attention` over an e4m3 cache by this kernel.

    Args:
        q: in 16 bits, or e4m3 codes (uint8).
        q_scale: as of `sparse_attention`.
        The others: as of `sparse_attention_hopper`.
    """
    head_size = q.shape[3]
    k, v = (x.view(torch.float8_e4m3fn) for x in (kv.k, kv.v))
    layout, q_layout = codes_layout(head_size), tile_layout(2)
    if is_e4m3(q):
        q, q_layout = q.view(torch.float8_e4m3fn), layout
    box = box_rows(kv.page_size, BLOCK_SIZE)
    scales = given_scales(q, q_scale, kv.k_scale, kv.v_scale)
    launch_kernel(
        _sparse_attention_hopper_e4m3_kernel,
        grid(q, slab, most_parts),
        out,
        descriptor(q, q_matrix, (BLOCK_SIZE // 2, head_size), q_layout),
        descriptor(k, matrix, (box, head_size), layout),
        descriptor(v, matrix, (box, head_size), layout),
        *tables,
        out if sinks is None else sinks,
        *scales,
        *numbers(kv, out, slab, most_parts, q_matrix, matrix, scale),
        *(scale_stride(x) for x in scales),
        **layout_constants(kv, q_matrix, matrix, sinks),
        **constants,
    )
