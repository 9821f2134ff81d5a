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
def _load_group(k_desc, v_desc, k_row, v_row, column, barrier, k_buffer, v_buffer, has_k, has_v):
    """Start loading what one round reads: the keys of its tile, and the values of the tile before."""
    tile_bytes: gl.constexpr = k_desc.block_type.nbytes
    mbarrier.expect(barrier, 2 * tile_bytes, pred=has_k & has_v)
    mbarrier.expect(barrier, tile_bytes, pred=has_k ^ has_v)
    tma.async_copy_global_to_shared(k_desc, [k_row, column], barrier, k_buffer, pred=has_k)
    tma.async_copy_global_to_shared(v_desc, [v_row, column], barrier, v_buffer, pred=has_v)


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
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(bars.index(n), count=1)
    fence_async_shared()
    # Group t, on barrier t % 2: keys of tile t in buffer t % 2, values of tile t - 1 in buffer (t - 1) % 2.
    yes = count > 0
    own_row = _tile_row(list_ptr, 0, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
    v_row = own_row
    if count > 1:
        v_row = _tile_row(list_ptr, 1, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
    next_row = own_row
    if count > 2:
        next_row = _tile_row(list_ptr, 2, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
    k_0, k_1, v_0, v_1 = k_buffers.index(0), k_buffers.index(1), v_buffers.index(0), v_buffers.index(1)
    _load_group(k_desc, v_desc, own_row, own_row, column, bars.index(0), k_0, v_1, yes, count < 0)
    _load_group(k_desc, v_desc, v_row, own_row, column, bars.index(1), k_1, v_0, count > 1, yes)

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
    mbarrier.wait(bars.index(0), 0)
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
    if (query_block + 1) * BLOCK > seq_len:
        mbarrier.wait(bars.index(1), 0)
        v = v_buffers.index(0).load(io_layout)
        tokens = query_block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, io_layout))
        gl.thread_barrier()
        v_buffers.index(0).store(gl.where((tokens < seq_len)[:, None], v, 0.0).to(dtype))
        fence_async_shared()
    gl.thread_barrier()
    _load_group(k_desc, v_desc, next_row, v_row, column, bars.index(0), k_0, v_1, count > 2, count > 1)

    # The rest: every row sees them whole, and all their tokens exist.
    for tile in range(1, count):
        v_row = next_row
        if tile + 2 < count:
            next_row = _tile_row(list_ptr, tile + 2, query_block, table_row_ptr, first_row, BLOCK, PAGE_SIZE)
        k_buffer, v_buffer = k_buffers.index(tile % 2), v_buffers.index(1 - tile % 2)
        mbarrier.wait(bars.index(tile % 2), tile // 2 % 2)
        s_run = warpgroup_mma(
            q_buffer, k_buffer.permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
        )
        acc_run = warpgroup_mma(p, v_buffer, warpgroup_mma_init(acc), is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_run])
        new_max = gl.maximum(row_max, gl.max(s, axis=1) * scale)
        p_next = gl.exp2(s * scale - new_max[:, None])
        correction = gl.exp2(row_max - new_max)
        row_sum = row_sum * correction + gl.sum(p_next, axis=1)
        row_max = new_max
        p_next = gl.convert_layout(p_next.to(dtype), p_layout)
        # Already complete. Its branch keeps ptxas from waiting for the product before the softmax.
        mbarrier.wait(bars.index(tile % 2), tile // 2 % 2)
        acc, _, p = warpgroup_mma_wait(0, deps=[acc_run, p, p_next])
        _load_group(
            k_desc, v_desc, next_row, v_row, column, bars.index(tile % 2), k_buffer, v_buffer,
            tile + 2 < count, tile + 1 < count,
        )  # fmt: skip
        acc = acc * gl.convert_layout(correction, acc_row_layout)[:, None]

    mbarrier.wait(bars.index(count % 2), count // 2 % 2)
    acc = warpgroup_mma(p, v_buffers.index((count - 1) % 2), acc)
    acc = acc / gl.convert_layout(row_sum, acc_row_layout)[:, None]
    for n in gl.static_range(2):
        mbarrier.invalidate(bars.index(n))
    out = gl.convert_layout(acc.to(dtype), io_layout)
    out_ptrs = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    gl.store(out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :], out, mask=mask_rows[:, None])
