"""Stage 4, attend: exact softmax attention of each query block over the keys of its kept blocks."""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import AttentionConfig, attention_configs, num_multiprocessors
from vllm_flashprefill.kernels.fp8 import e4m3_codes, from_e4m3, has_e4m3_instruction, load_scale, scale_stride
from vllm_flashprefill.kernels.schedule import Schedule, Slab

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from vllm_flashprefill.kernels.sparse_attention_hopper import (
        PANEL,
        _sparse_attention_hopper_kernel,
        box_rows,
        tile_layout,
    )
except ImportError:  # Triton before 3.5
    _sparse_attention_hopper_kernel = None

LOG2_E = math.log2(math.e)


@triton.jit
def _token_offsets(tokens, mask_tokens, table_row_ptr, kv_start, stride_page, stride_token, PAGE_SIZE: tl.constexpr):
    """int64 element offsets of the rows of some tokens of one sequence."""
    if PAGE_SIZE > 0:
        pages = tl.load(table_row_ptr + tokens // PAGE_SIZE, mask=mask_tokens).to(tl.int64)
        return pages * stride_page + (tokens % PAGE_SIZE).to(tl.int64) * stride_token
    else:
        return (kv_start + tokens).to(tl.int64) * stride_token


@triton.jit
def _softmax_step(s, v, acc, row_max, row_sum, scale):
    """Take in one tile. s: [BLOCK, BLOCK_N] logits before scaling; v: [BLOCK_N, HEAD_SIZE]."""
    new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, axis=1)
    acc = acc * correction[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, new_max, row_sum


@triton.jit(
    do_not_specialize=[
        "first_item", "num_dense_items", "rows_per_batch", "stride_table", "stride_k_scale", "stride_v_scale",
    ]
)  # fmt: skip
def _sparse_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_desc,
    v_desc,
    block_table_ptr,
    requests_ptr,
    items_ptr,
    lists_ptr,
    counts_ptr,
    k_scale_ptr,
    v_scale_ptr,
    first_item,
    num_dense_items,
    rows_per_batch,
    scale,
    stride_qb: tl.int64,
    stride_qt,
    stride_qh,
    stride_ob: tl.int64,
    stride_ot,
    stride_oh,
    stride_kp: tl.int64,
    stride_kt,
    stride_kg,
    stride_vp: tl.int64,
    stride_vt,
    stride_vg,
    stride_table,
    stride_k_scale,
    stride_v_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
    USE_TMA: tl.constexpr,
    BY_HEAD: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    work = tl.program_id(0)
    if BY_HEAD:
        # After the dense items, one KV head's query blocks after another's: they share keys in the L2 cache.
        num_dense = num_dense_items * NUM_HEADS
        if work >= num_dense:
            per_kv_head = (tl.num_programs(0) - num_dense) // (NUM_HEADS // GROUP)
            within = (work - num_dense) % per_kv_head
            work = (work - num_dense) // per_kv_head * GROUP + within % GROUP
            work += num_dense + within // GROUP * NUM_HEADS
    head = work % NUM_HEADS
    kv_head = head // GROUP
    item_ptr = items_ptr + (first_item + work // NUM_HEADS) * columns.ITEM_COLUMNS
    request_ptr = requests_ptr + tl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
    query_block = tl.load(item_ptr + columns.QUERY_BLOCK)
    list_slot = tl.load(item_ptr + columns.LIST_SLOT).to(tl.int64)
    list_ptr = lists_ptr + (list_slot * NUM_HEADS + head.to(tl.int64) * (query_block + 1))
    count = tl.load(counts_ptr + work)
    batch = tl.load(request_ptr + columns.BATCH)
    query_len = tl.load(request_ptr + columns.QUERY_LEN)
    context_len = tl.load(request_ptr + columns.CONTEXT_LEN)
    kv_start = tl.load(request_ptr + columns.KV_START)
    seq_len = context_len + query_len
    if PAGE_SIZE > 0:
        table_row_ptr = block_table_ptr + tl.load(request_ptr + columns.TABLE_ROW).to(tl.int64) * stride_table
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_kg
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_vg
    else:
        table_row_ptr = block_table_ptr
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_kg + batch.to(tl.int64) * stride_kp
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_vg + batch.to(tl.int64) * stride_vp

    offs_m = tl.arange(0, BLOCK)
    offs_n = tl.arange(0, BLOCK_N)
    offs_dim = tl.arange(0, HEAD_SIZE)
    rows = query_block * BLOCK + offs_m - context_len
    mask_rows = (rows >= 0) & (rows < query_len)
    offs_rows = (tl.load(request_ptr + columns.QUERY_START) + rows).to(tl.int64)
    # [BLOCK, HEAD_SIZE]
    q_ptrs = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_ptrs = q_ptrs + offs_rows[:, None] * stride_qt + offs_dim[None, :]
    q = tl.load(q_ptrs, mask=mask_rows[:, None], other=0.0)
    if FP8:
        # e4m3 becomes float16, so q does too.
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
        scale *= load_scale(k_scale_ptr, kv_head, stride_k_scale)

    row_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, HEAD_SIZE], dtype=tl.float32)

    # Blocks before the query's own: every row sees them whole, and all their tokens exist.
    TILES: tl.constexpr = BLOCK // BLOCK_N
    for tile in tl.range(0, (count - 1) * TILES, num_stages=NUM_STAGES):
        start = tl.load(list_ptr + tile // TILES) * BLOCK + (tile % TILES) * BLOCK_N
        # k, v: [BLOCK_N, HEAD_SIZE]
        if USE_TMA:
            if PAGE_SIZE > 0:
                row = tl.load(table_row_ptr + start // PAGE_SIZE) * rows_per_batch + start % PAGE_SIZE
            else:
                row = batch * rows_per_batch + kv_start + start
            k = k_desc.load([row, kv_head * HEAD_SIZE])
            if FP8:
                k = from_e4m3(k, FP8_NATIVE)
            s = tl.dot(q, tl.trans(k))
            v = v_desc.load([row, kv_head * HEAD_SIZE])
            if FP8:
                v = from_e4m3(v, FP8_NATIVE)
        else:
            tokens = start + offs_n
            offs_k = _token_offsets(tokens, None, table_row_ptr, kv_start, stride_kp, stride_kt, PAGE_SIZE)
            k = tl.load(k_head_ptr + offs_k[:, None] + offs_dim[None, :])
            if FP8:
                k = from_e4m3(k, FP8_NATIVE)
            s = tl.dot(q, tl.trans(k))
            offs_v = _token_offsets(tokens, None, table_row_ptr, kv_start, stride_vp, stride_vt, PAGE_SIZE)
            v = tl.load(v_head_ptr + offs_v[:, None] + offs_dim[None, :])
            if FP8:
                v = from_e4m3(v, FP8_NATIVE)
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum, scale)

    # The query's own block, causal; its tokens may end within it.
    for start in tl.range(query_block * BLOCK, tl.minimum((query_block + 1) * BLOCK, seq_len), BLOCK_N, num_stages=1):
        tokens = start + offs_n
        mask_tokens = tokens < seq_len
        offs_k = _token_offsets(tokens, mask_tokens, table_row_ptr, kv_start, stride_kp, stride_kt, PAGE_SIZE)
        k = tl.load(k_head_ptr + offs_k[:, None] + offs_dim[None, :], mask=mask_tokens[:, None], other=0)
        if FP8:
            k = from_e4m3(k, FP8_NATIVE)
        s = tl.dot(q, tl.trans(k))
        s = tl.where((query_block * BLOCK + offs_m)[:, None] >= tokens[None, :], s, float("-inf"))
        offs_v = _token_offsets(tokens, mask_tokens, table_row_ptr, kv_start, stride_vp, stride_vt, PAGE_SIZE)
        v = tl.load(v_head_ptr + offs_v[:, None] + offs_dim[None, :], mask=mask_tokens[:, None], other=0)
        if FP8:
            v = from_e4m3(v, FP8_NATIVE)
        acc, row_max, row_sum = _softmax_step(s, v, acc, row_max, row_sum, scale)

    out = acc / row_sum[:, None] * load_scale(v_scale_ptr, kv_head, stride_v_scale)
    out_ptrs = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    out_ptrs = out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_rows[:, None])


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: Schedule,
    slab: Slab,
    *,
    lists: torch.Tensor,
    counts: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    launch: AttentionConfig | None = None,
) -> None:
    """Attention of a slab's query blocks over the blocks in their lists.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone.
        k, v: [batch, tokens, G, D], or with a block table the caches [num_pages, page_size, G, D]. e4m3 if their
            dtype is that or uint8; then the products are in float16, to whose range q is clamped.
        lists, counts: from `block_select`.
        block_table: [rows, max pages] int32.
        k_scale, v_scale: float32 of one element or [G], what e4m3 keys and values are multiplied by; 1 if None.
        launch: tile sizes, to replace the committed table's; with tma, the tensors must allow descriptors.
    """
    k, v = e4m3_codes(k), e4m3_codes(v)
    fp8 = k.dtype == torch.uint8
    num_heads, head_size = q.shape[2:]
    page_size = 0 if block_table is None else k.shape[1]
    matrix = _as_matrix(k) if k.stride() == v.stride() and _as_matrix(v) else None
    choices = (launch,) if launch else attention_configs(q.device, head_size)
    q_matrix = _as_matrix(q)
    launch = next((c for c in choices if _fits(c, q_matrix, matrix, head_size, page_size, fp8)), choices[-1])
    if launch.gluon:
        _launch_hopper(
            q, k, v, schedule, slab, lists, counts, softmax_scale, out, block_table, page_size, launch, q_matrix, matrix
        )
        return
    use_tma = launch.tma
    tile = [launch.block_n, head_size]
    _sparse_attention_kernel[(slab.num_items * num_heads,)](
        q,
        k,
        v,
        out,
        TensorDescriptor(k, matrix.shape, matrix.strides, tile) if use_tma else None,
        TensorDescriptor(v, matrix.shape, matrix.strides, tile) if use_tma else None,
        block_table,
        schedule.requests,
        schedule.items,
        lists,
        counts,
        k_scale,
        v_scale,
        slab.first_item,
        slab.num_dense_items,
        matrix.rows_per_batch if use_tma else 0,
        softmax_scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        v.stride(0),
        v.stride(1),
        v.stride(2),
        0 if block_table is None else block_table.stride(0),
        scale_stride(k_scale),
        scale_stride(v_scale),
        NUM_HEADS=num_heads,
        GROUP=num_heads // k.shape[2],
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        BLOCK_N=launch.block_n,
        PAGE_SIZE=page_size,
        FP8=fp8,
        FP8_NATIVE=has_e4m3_instruction(q.device),
        USE_TMA=use_tma,
        BY_HEAD=launch.by_head,
        NUM_STAGES=launch.num_stages,
        num_warps=launch.num_warps,
    )


def _launch_hopper(
    q, k, v, schedule, slab, lists, counts, softmax_scale, out, block_table, page_size, launch, q_matrix, matrix
) -> None:
    num_heads, head_size = q.shape[2:]
    num_pairs = slab.num_items * num_heads
    layout = tile_layout(k.element_size())
    box = box_rows(page_size, BLOCK_SIZE)
    _sparse_attention_hopper_kernel[(min(num_pairs, num_multiprocessors(q.device)),)](
        out,
        # A warpgroup's half of a query block.
        GluonDescriptor(q, q_matrix.shape, q_matrix.strides, [BLOCK_SIZE // 2, head_size], layout),
        GluonDescriptor(k, matrix.shape, matrix.strides, [box, PANEL], layout),
        GluonDescriptor(v, matrix.shape, matrix.strides, [box, PANEL], layout),
        block_table,
        schedule.requests,
        schedule.items,
        lists,
        counts,
        schedule.next_pair,
        slab.first_item,
        slab.num_dense_items,
        num_pairs,
        q_matrix.rows_per_batch,
        q_matrix.rows_per_head,
        matrix.rows_per_batch,
        matrix.rows_per_head,
        softmax_scale * LOG2_E,
        out.stride(0),
        out.stride(1),
        out.stride(2),
        0 if block_table is None else block_table.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // k.shape[2],
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        BOX=box,
        PAGE_SIZE=page_size,
        Q_COLUMNS=q_matrix.columns_per_head,
        KV_COLUMNS=matrix.columns_per_head,
        num_warps=launch.num_warps,
    )


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """[a, b, heads, D] as a matrix that a tensor descriptor can describe.

    Element [i, j, h, d] lies in row i * rows_per_batch + h * rows_per_head + j, column h * columns_per_head + d.
    """

    shape: list[int]
    strides: list[int]
    rows_per_batch: int
    rows_per_head: int
    columns_per_head: int


def _as_matrix(x: torch.Tensor) -> _Matrix | None:
    """x as a matrix, heads beside each other in a row or one below the other; None where its strides allow neither."""
    a, b, num_heads, head_size = x.shape
    batch_stride, row_stride, head_stride, _ = x.stride()
    if TensorDescriptor is None or x.data_ptr() % 16 or row_stride * x.element_size() % 16 or row_stride < head_size:
        return None
    batch_stride = batch_stride if a > 1 else b * row_stride
    if batch_stride % row_stride:
        return None
    rows_per_batch = batch_stride // row_stride
    if num_heads == 1 or head_stride == head_size:
        rows_per_head, columns_per_head = 0, head_size
    elif head_stride % row_stride == 0:
        rows_per_head, columns_per_head = head_stride // row_stride, 0
    else:
        return None
    rows = (a - 1) * rows_per_batch + (num_heads - 1) * rows_per_head + b
    columns = (num_heads - 1) * columns_per_head + head_size
    if rows >= 2**31 or columns > row_stride:
        return None
    return _Matrix([rows, columns], [row_stride, 1], rows_per_batch, rows_per_head, columns_per_head)


def _fits(
    launch: AttentionConfig,
    q_matrix: _Matrix | None,
    matrix: _Matrix | None,
    head_size: int,
    page_size: int,
    fp8: bool,
) -> bool:
    """Whether a configuration can take these strides, pages and keys."""
    if not launch.tma:
        return True
    if matrix is None:
        return False
    if launch.gluon:
        return not fp8 and _sparse_attention_hopper_kernel is not None and q_matrix is not None
    if page_size % launch.block_n:
        return False
    # Heads beside each other: neither one below the other nor one for all.
    return matrix.columns_per_head == head_size
