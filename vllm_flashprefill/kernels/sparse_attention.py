"""Stage 4, attend: exact softmax attention of each query block over the keys of its kept blocks."""

from __future__ import annotations

import logging
import math
import re

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.configs import AttentionConfig, attention_configs
from vllm_flashprefill.kernels.descriptors import as_matrix, descriptor, no_matrix
from vllm_flashprefill.kernels.fp8 import from_e4m3, has_e4m3_instruction, load_scale, scale_stride
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.parts import Parts
from vllm_flashprefill.kernels.schedule import Schedule, Slab
from vllm_flashprefill.key_values import KeyValues

try:
    from vllm_flashprefill.kernels import sparse_attention_hopper as hopper
    from vllm_flashprefill.kernels import sparse_attention_hopper_e4m3 as hopper_e4m3
    from vllm_flashprefill.kernels import sparse_attention_hopper_fp8 as hopper_fp8
except (ImportError, AttributeError):  # Triton before 3.5, or one that has renamed what the kernels use
    hopper = hopper_e4m3 = hopper_fp8 = None

logger = logging.getLogger("vllm.flashprefill")

# Launches that did not compile in this process, whether for e4m3, and whether with products in it.
_broken: set[tuple[AttentionConfig, bool, bool]] = set()
_warned: set[tuple[str, int, str]] = set()

LOG2_E = tl.constexpr(math.log2(math.e))


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
        "counters_ptr", "parts_ptr", "sinks_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "first_item",
        "num_dense_items", "max_parts", "rows_per_batch", "rows_per_head", "stride_table", "stride_q_scale",
        "stride_k_scale", "stride_v_scale",
    ]
)  # fmt: skip
def _sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_desc, v_desc, block_table_ptr, requests_ptr, items_ptr, lists_ptr, counts_ptr,
    counters_ptr, parts_ptr, sums_ptr, sinks_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, first_item, num_dense_items,
    max_parts, rows_per_batch, rows_per_head, scale,
    stride_qb: tl.int64, stride_qt, stride_qh, stride_ob: tl.int64, stride_ot, stride_oh,
    stride_kp: tl.int64, stride_kt, stride_kg, stride_vp: tl.int64, stride_vt, stride_vg,
    stride_table, stride_q_scale, stride_k_scale, stride_v_scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, FP8_NATIVE: tl.constexpr,
    USE_TMA: tl.constexpr, KV_COLUMNS: tl.constexpr, BY_HEAD: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    # Parts of split lists, then pairs.
    work = tl.program_id(0) - max_parts
    if BY_HEAD:
        # After the dense items, one KV head's query blocks after another's: they share keys in the L2 cache.
        num_dense = num_dense_items * NUM_HEADS
        if work >= num_dense:
            per_kv_head = (tl.num_programs(0) - max_parts - num_dense) // (NUM_HEADS // GROUP)
            within = (work - num_dense) % per_kv_head
            work = (work - num_dense) // per_kv_head * GROUP + within % GROUP
            work += num_dense + within // GROUP * NUM_HEADS
    part = -1
    if parts_ptr is not None:
        if work < 0:
            part = work + max_parts
            if part >= tl.load(counters_ptr + columns.NUM_PARTS):
                return
            work = tl.load(parts_ptr + part * columns.PART_COLUMNS + columns.PAIR)
            if work < 0:
                return
        elif tl.load(parts_ptr + max_parts * columns.PART_COLUMNS + work) >= 0:
            return
    head = work % NUM_HEADS
    kv_head = head // GROUP
    item_ptr = items_ptr + (first_item + work // NUM_HEADS) * columns.ITEM_COLUMNS
    request_ptr = requests_ptr + tl.load(item_ptr + columns.REQUEST) * columns.REQUEST_COLUMNS
    query_block = tl.load(item_ptr + columns.QUERY_BLOCK)
    list_slot = tl.load(item_ptr + columns.LIST_SLOT).to(tl.int64)
    list_ptr = lists_ptr + (list_slot * NUM_HEADS + head.to(tl.int64) * (query_block + 1))
    first_tile, end_tile = 0, tl.load(counts_ptr + work)
    if parts_ptr is not None:
        if part >= 0:
            first_tile = tl.load(parts_ptr + part * columns.PART_COLUMNS + columns.FIRST_TILE)
            end_tile = first_tile + tl.load(parts_ptr + part * columns.PART_COLUMNS + columns.NUM_TILES)
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
    q = tl.load(q_ptrs, mask=mask_rows[:, None], other=0)
    if FP8:
        # e4m3 becomes float16, so q does too.
        if q.dtype == tl.uint8:
            q = from_e4m3(q, FP8_NATIVE)
        else:
            q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
        scale *= load_scale(q_scale_ptr, kv_head, stride_q_scale) * load_scale(k_scale_ptr, kv_head, stride_k_scale)

    row_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, HEAD_SIZE], dtype=tl.float32)

    # Blocks before the query's own: every row sees them whole, and all their tokens exist.
    TILES: tl.constexpr = BLOCK // BLOCK_N
    for tile in tl.range(tl.maximum(first_tile - 1, 0) * TILES, (end_tile - 1) * TILES, num_stages=NUM_STAGES):
        start = tl.load(list_ptr + tile // TILES) * BLOCK + (tile % TILES) * BLOCK_N
        # k, v: [BLOCK_N, HEAD_SIZE]
        if USE_TMA:
            if PAGE_SIZE > 0:
                row = tl.load(table_row_ptr + start // PAGE_SIZE) * rows_per_batch + start % PAGE_SIZE
            else:
                row = batch * rows_per_batch + kv_start + start
            row += kv_head * rows_per_head
            k = k_desc.load([row, kv_head * KV_COLUMNS])
            if FP8:
                k = from_e4m3(k, FP8_NATIVE)
            s = tl.dot(q, tl.trans(k))
            v = v_desc.load([row, kv_head * KV_COLUMNS])
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
    own_end = tl.where(first_tile == 0, tl.minimum((query_block + 1) * BLOCK, seq_len), 0)
    for start in tl.range(query_block * BLOCK, own_end, BLOCK_N, num_stages=1):
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

    v_scale = load_scale(v_scale_ptr, kv_head, stride_v_scale)
    if parts_ptr is not None:
        if part >= 0:
            sum_ptrs = sums_ptr + part.to(tl.int64) * (BLOCK * HEAD_SIZE) + offs_m[:, None] * HEAD_SIZE
            tl.store(sum_ptrs + offs_dim[None, :], acc / row_sum[:, None] * v_scale)
            lse_ptrs = sums_ptr + max_parts.to(tl.int64) * (BLOCK * HEAD_SIZE) + part * BLOCK + offs_m
            tl.store(lse_ptrs, row_max + tl.log2(row_sum))
            return
    if sinks_ptr is not None:
        row_sum += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E - row_max)
    out = acc / row_sum[:, None] * v_scale
    out_ptrs = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    out_ptrs = out_ptrs + offs_rows[:, None] * stride_ot + offs_dim[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_rows[:, None])


def sparse_attention(
    q: torch.Tensor,
    kv: KeyValues,
    schedule: Schedule,
    slab: Slab,
    *,
    lists: torch.Tensor,
    counts: torch.Tensor,
    parts: Parts | None = None,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    value_tiles: torch.Tensor | None = None,
    launch: AttentionConfig | None = None,
) -> None:
    """Attention of a slab's query blocks over the blocks in their lists.

    Those whose lists are split, where the slab's part_tiles is not 0, have none before `parts.join_parts`.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone. q may be e4m3 codes
            (uint8) where kv is e4m3 too, and must be with value_tiles.
        kv: with e4m3 the products are in float16, to whose range q is clamped.
        q_scale, sinks: as of `api.flash_prefill_paged`.
        lists, counts, parts: from `block_select`.
        value_tiles: of `value_tiles.value_tiles`, where `takes_fp8_products`: the products are in e4m3, to which the
            probabilities times 256 are rounded.
        launch: tile sizes, to replace the committed table's; with tma, the tensors must allow descriptors.
    """
    head_size = q.shape[3]
    parts = parts if slab.part_tiles else None
    arguments = (
        q, kv, schedule, slab, lists, counts, parts, softmax_scale, q_scale, sinks, out, value_tiles
    )  # fmt: skip
    choices = (launch,) if launch else attention_configs(q.device, head_size)
    for choice in choices[:-1]:
        if (misfit := _misfit(choice, q, kv, value_tiles is not None)) is None:
            try:
                _launch(choice, *arguments)
                return
            except Exception as error:
                _broken.add((choice, kv.fp8, value_tiles is not None))
                misfit = f"{type(error).__name__}: {error}"
        if misfit:
            _warn_slower("Hopper" if choice.gluon else "TMA", head_size, misfit)
    _launch(choices[-1], *arguments)


def takes_fp8_products(q: torch.Tensor, kv: KeyValues) -> bool:
    """Whether there is a kernel that multiplies these queries, keys and values in e4m3; says why not."""
    choice = attention_configs(q.device, q.shape[3])[0]
    if not choice.gluon or not kv.fp8:
        return False
    misfit = _misfit(choice, q, kv, True)
    if misfit is None and any(stride % 4 for stride in kv.v.stride()[:3]):
        misfit = f"values have the strides {kv.v.stride()}, no multiples of 4"
    if misfit:
        _warn_slower("e4m3 products", q.shape[3], misfit)
    return misfit is None


def _misfit(launch: AttentionConfig, q: torch.Tensor, kv: KeyValues, fp8_products: bool) -> str | None:
    """Why a configuration cannot take these tensors and pages; "" where that has been said, None where it can."""
    if (launch, kv.fp8, fp8_products) in _broken:
        return ""
    if launch.gluon and hopper is None:
        return f"Triton {triton.__version__} has no Gluon, or none that the kernel knows (3.5 to 3.9 have)"
    k, v = kv.codes()
    if (reason := no_matrix(k)) or (reason := no_matrix(v)):
        return f"of keys or values, {reason}"
    if k.stride() != v.stride():
        return f"keys have the strides {k.stride()}, values {v.stride()}"
    if launch.gluon:
        return f"of queries, {reason}" if (reason := no_matrix(q)) else None
    if kv.page_size % launch.block_n:
        return f"its tiles of {launch.block_n} tokens need pages of a multiple of that, not of {kv.page_size}"
    return None


def _launch(
    launch: AttentionConfig,
    q: torch.Tensor,
    kv: KeyValues,
    schedule: Schedule,
    slab: Slab,
    lists: torch.Tensor,
    counts: torch.Tensor,
    parts: Parts | None,
    softmax_scale: float,
    q_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    value_tiles: torch.Tensor | None,
) -> None:
    k, v = kv.codes()
    num_heads, head_size = q.shape[2:]
    tables = (kv.block_table, schedule.requests, schedule.items, lists, counts, schedule.counters)
    most_parts = parts.max_parts if parts else 0
    # Where there are none, Gluon kernels, whose tuples hold no None, get something that they do not read.
    absent = (schedule.counters, out) if launch.gluon else (None, None)
    tables += (parts.rows, parts.sums) if parts else absent
    scale = softmax_scale * LOG2_E.value
    constants = dict(
        NUM_HEADS=num_heads,
        GROUP=num_heads // kv.num_heads,
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        PAGE_SIZE=kv.page_size,
        num_warps=launch.num_warps,
    )
    if launch.gluon:
        constants["SPLIT"] = parts is not None
        arguments = most_parts, as_matrix(q), as_matrix(k), tables, scale, sinks
        if not kv.fp8:
            hopper.sparse_attention_hopper(q, kv, out, slab, *arguments, **constants)
        elif value_tiles is None:
            hopper_e4m3.sparse_attention_hopper_e4m3(q, kv, out, slab, *arguments, q_scale, **constants)
        else:
            hopper_fp8.sparse_attention_hopper_fp8(q, kv, value_tiles, out, slab, *arguments, q_scale, **constants)
        return
    matrix = as_matrix(k) if launch.tma else None
    tile = launch.block_n, head_size
    launch_kernel(
        _sparse_attention_kernel,
        (most_parts + slab.num_items * num_heads,),
        q,
        k,
        v,
        out,
        descriptor(k, matrix, tile) if matrix else None,
        descriptor(v, matrix, tile) if matrix else None,
        *tables,
        sinks,
        q_scale,
        kv.k_scale,
        kv.v_scale,
        slab.first_item,
        slab.num_dense_items,
        most_parts,
        matrix.rows_per_batch if matrix else 0,
        matrix.rows_per_head if matrix else 0,
        scale,
        *q.stride()[:3],
        *out.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        kv.table_stride,
        scale_stride(q_scale),
        scale_stride(kv.k_scale),
        scale_stride(kv.v_scale),
        BLOCK_N=launch.block_n,
        FP8=kv.fp8,
        FP8_NATIVE=has_e4m3_instruction(q.device),
        USE_TMA=launch.tma,
        KV_COLUMNS=matrix.columns_per_head if matrix else 0,
        BY_HEAD=launch.by_head,
        NUM_STAGES=launch.num_stages,
        **constants,
    )


def _warn_slower(kernel: str, head_size: int, reason: str) -> None:
    """Once for each reason, whatever its numbers."""
    kind = kernel, head_size, re.sub(r"\d+", "", reason)
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("FlashPrefill: heads of %d take a slower kernel than the %s one: %s", head_size, kernel, reason)
