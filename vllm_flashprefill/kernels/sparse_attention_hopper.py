"""Stage 4 on Hopper, in Gluon: scores of the next tile and the softmax of this one run beside the values' product.

A tile is a whole key block, loaded by the tensor copy engine into one of two buffers. The query's own block goes
first, since it alone needs a mask.
"""

from __future__ import annotations

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


def tile_layout(element_size: int) -> gl.NVMMASharedLayout:
    """How a tile of k or v lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * element_size, rank=2)


@gluon.jit
def _load_tile(desc, row, column, barrier, buffer, pred):
    mbarrier.expect(barrier, desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(desc, [row, column], barrier, buffer, pred=pred)


@gluon.jit
def _tile_row(list_ptr, tile, query_block, table_row_ptr, first_row, BLOCK: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """First row of a tile in k and v as matrices. Tile 0 is the query's own block, tile t the list's entry t - 1."""
    block = query_block
    if tile > 0:
        block = gl.load(list_ptr + tile - 1)
    if PAGE_SIZE > 0:
        return gl.load(table_row_ptr + block * BLOCK // PAGE_SIZE) * PAGE_SIZE + block * BLOCK % PAGE_SIZE
    else:
        return first_row + block * BLOCK


@gluon.jit(do_not_specialize=["first_item", "num_dense_items", "rows_per_batch", "stride_table"])
def _sparse_attention_hopper_kernel(
    q_ptr,
    out_ptr,
    k_desc,
    v_desc,
    block_table_ptr,
    requests_ptr,
    items_ptr,
    lists_ptr,
    counts_ptr,
    first_item,
    num_dense_items,
    rows_per_batch,
    scale,
    stride_qb: gl.int64,
    stride_qt,
    stride_qh,
    stride_ob: gl.int64,
    stride_ot,
    stride_oh,
    stride_table,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    BLOCK: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD_SIZE, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    smem_layout: gl.constexpr = k_desc.layout

    # One KV head's query blocks after another's, past the dense items: they share keys in the L2 cache.
    work = gl.program_id(0)
    num_dense = num_dense_items * NUM_HEADS
    if work >= num_dense:
        per_kv_head = (gl.num_programs(0) - num_dense) // (NUM_HEADS // GROUP)
        within = (work - num_dense) % per_kv_head
        work = num_dense + (work - num_dense) // per_kv_head * GROUP + within % GROUP + within // GROUP * NUM_HEADS
    head = work % NUM_HEADS
    item_ptr = items_ptr + (first_item + work // NUM_HEADS) * 3
    request_ptr = requests_ptr + gl.load(item_ptr) * 8
    query_block = gl.load(item_ptr + 1)
    list_ptr = lists_ptr + gl.load(item_ptr + 2).to(gl.int64) * NUM_HEADS + head.to(gl.int64) * (query_block + 1)
    count = gl.load(counts_ptr + work)
    batch = gl.load(request_ptr)
    query_len = gl.load(request_ptr + 2)
    context_len = gl.load(request_ptr + 3)
    seq_len = context_len + query_len
    first_row = batch * rows_per_batch + gl.load(request_ptr + 4)
    table_row_ptr = block_table_ptr
    if PAGE_SIZE > 0:
        table_row_ptr += gl.load(request_ptr + 5).to(gl.int64) * stride_table
    column = head // GROUP * HEAD_SIZE

    k_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK, HEAD_SIZE], smem_layout)
    v_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK, HEAD_SIZE], smem_layout)
    q_buffer = gl.allocate_shared_memory(dtype, [BLOCK, HEAD_SIZE], smem_layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(k_bars.index(n), count=1)
        mbarrier.init(v_bars.index(n), count=1)
    fence_async_shared()
    for n in gl.static_range(2):
        if n < count:
            row = _tile_row(list_ptr, n, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
            _load_tile(k_desc, row, column, k_bars.index(n), k_buffers.index(n), True)
            _load_tile(v_desc, row, column, v_bars.index(n), v_buffers.index(n), True)

    rows = query_block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, io_layout)) - context_len
    mask_rows = (rows >= 0) & (rows < query_len)
    offs_rows = (gl.load(request_ptr + 1) + rows).to(gl.int64)
    offs_dim = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, io_layout))
    # [BLOCK, HEAD_SIZE]
    q_ptrs = q_ptr + batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
    q_ptrs = q_ptrs + offs_rows[:, None] * stride_qt + offs_dim[None, :]
    q_buffer.store(gl.load(q_ptrs, mask=mask_rows[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    # The query's own block, causal. Its tokens may end within it: what lies behind them may be NaN.
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
    mbarrier.wait(k_bars.index(0), 0)
    # [BLOCK, BLOCK]
    s = warpgroup_mma(q_buffer, k_buffers.index(0).permute((1, 0)), zeros, use_acc=False)
    offs_m = gl.arange(0, BLOCK, layout=row_layout)
    offs_n = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    s = gl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
    row_max = gl.max(s, axis=1) * scale
    p = gl.exp2(s * scale - row_max[:, None])
    row_sum = gl.sum(p, axis=1)
    p = gl.convert_layout(p.to(dtype), p_layout)
    acc = gl.zeros([BLOCK, HEAD_SIZE], gl.float32, acc_layout)
    mbarrier.wait(v_bars.index(0), 0)
    if (query_block + 1) * BLOCK > seq_len:
        v = v_buffers.index(0).load(io_layout)
        tokens = query_block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, io_layout))
        gl.thread_barrier()
        v_buffers.index(0).store(gl.where((tokens < seq_len)[:, None], v, 0.0).to(dtype))
        fence_async_shared()
    gl.thread_barrier()
    if count > 2:
        row = _tile_row(list_ptr, 2, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
        _load_tile(k_desc, row, column, k_bars.index(0), k_buffers.index(0), True)

    # The rest: every row sees them whole, and all their tokens exist.
    next_row = 0
    if count > 2:
        next_row = _tile_row(list_ptr, 2, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
    for tile in range(1, count):
        buffer = tile % 2
        phase = tile // 2 % 2
        # K of tile + 2 and V of tile + 1 are loaded at the end of this round.
        v_row = next_row
        if tile + 2 < count:
            next_row = _tile_row(list_ptr, tile + 2, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
        mbarrier.wait(k_bars.index(buffer), phase)
        s_run = warpgroup_mma(
            q_buffer, k_buffers.index(buffer).permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
        )
        mbarrier.wait(v_bars.index(1 - buffer), (tile - 1) // 2 % 2)
        acc_run = warpgroup_mma(p, v_buffers.index(1 - buffer), warpgroup_mma_init(acc), is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_run])
        new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale)
        p32 = gl.exp2(s * scale - new_max[:, None])
        correction = gl.exp2(row_max - new_max)
        row_sum = row_sum * correction + gl.sum(p32, axis=1)
        row_max = new_max
        acc, _ = warpgroup_mma_wait(0, deps=[acc_run, p])
        gl.thread_barrier()
        _load_tile(k_desc, next_row, column, k_bars.index(buffer), k_buffers.index(buffer), tile + 2 < count)
        _load_tile(v_desc, v_row, column, v_bars.index(1 - buffer), v_buffers.index(1 - buffer), tile + 1 < count)
        acc = acc * gl.convert_layout(correction, acc_row_layout)[:, None]
        p = gl.convert_layout(p32.to(dtype), p_layout)

    last = count - 1
    mbarrier.wait(v_bars.index(last % 2), last // 2 % 2)
    acc = warpgroup_mma(p, v_buffers.index(last % 2), acc)
    acc = acc / gl.convert_layout(row_sum, acc_row_layout)[:, None]
    gl.thread_barrier()
    for n in gl.static_range(2):
        mbarrier.invalidate(k_bars.index(n))
        mbarrier.invalidate(v_bars.index(n))
    out = gl.convert_layout(acc.to(dtype), io_layout)
    out_ptrs = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    gl.store(out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :], out, mask=mask_rows[:, None])
