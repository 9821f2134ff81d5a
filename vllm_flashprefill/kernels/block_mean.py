"""Stage 1, pool: the mean key of each block, and of each piece of it, from plain or paged keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.fp8 import from_e4m3, has_e4m3_instruction, load_scale, scale_stride
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Schedule
from vllm_flashprefill.key_values import KeyValues

# Means are kept in float16 whatever the keys are: 8 times finer than bfloat16, and a mean key beyond its range
# (65504) is no real model's; such a value is clamped.
MEAN_DTYPE = torch.float16
# What CUDA takes of a grid's third dimension.
MAX_REQUESTS = 65_535


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0)


@triton.jit(do_not_specialize=["k_scale_ptr", "num_mean_rows", "stride_table", "stride_k_scale"])
def _block_mean_kernel(
    k_ptr,
    mean_ptr,
    piece_ptr,
    block_table_ptr,
    requests_ptr,
    k_scale_ptr,
    stride_kp: tl.int64,
    stride_kt,
    stride_kg,
    stride_table,
    stride_k_scale,
    num_mean_rows,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    FP8: tl.constexpr,
    FP8_NATIVE: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request_ptr = requests_ptr + tl.program_id(2) * columns.REQUEST_COLUMNS
    seq_len = tl.load(request_ptr + columns.QUERY_LEN) + tl.load(request_ptr + columns.CONTEXT_LEN)
    if block * BLOCK >= seq_len:
        return

    offs_n = tl.arange(0, BLOCK)
    if PIECES:
        # First the first key of each piece, then the second of each: a thread then holds whole pieces.
        offs_n = offs_n % PIECES * (BLOCK // PIECES) + offs_n // PIECES
    tokens = block * BLOCK + offs_n
    mask_tokens = tokens < seq_len
    if PAGE_SIZE > 0:
        table_row = tl.load(request_ptr + columns.TABLE_ROW).to(tl.int64)
        pages = tl.load(block_table_ptr + table_row * stride_table + tokens // PAGE_SIZE, mask=mask_tokens, other=0)
        offs_tokens = pages.to(tl.int64) * stride_kp + (tokens % PAGE_SIZE).to(tl.int64) * stride_kt
    else:
        batch = tl.load(request_ptr + columns.BATCH).to(tl.int64)
        offs_tokens = batch * stride_kp + (tl.load(request_ptr + columns.KV_START) + tokens).to(tl.int64) * stride_kt
    offs_dim = tl.arange(0, HEAD_SIZE)
    # [BLOCK, HEAD_SIZE]
    k_ptrs = k_ptr + offs_tokens[:, None] + kv_head.to(tl.int64) * stride_kg + offs_dim[None, :]
    k = tl.load(k_ptrs, mask=mask_tokens[:, None], other=0)
    if FP8:
        k = from_e4m3(k, FP8_NATIVE)
    k = k.to(tl.float32) * load_scale(k_scale_ptr, kv_head, stride_k_scale)
    row = kv_head.to(tl.int64) * num_mean_rows + tl.load(request_ptr + columns.MEAN_START) + block
    if PIECES:
        # [PIECES, HEAD_SIZE]; of a last, partial block nothing reads them.
        k = tl.sum(tl.reshape(k, [BLOCK // PIECES, PIECES, HEAD_SIZE]), axis=0)
        offs_piece = row * PIECES + tl.arange(0, PIECES)
        piece_ptrs = piece_ptr + offs_piece[:, None] * HEAD_SIZE + offs_dim[None, :]
        tl.store(piece_ptrs, _clamped(k * (PIECES / BLOCK)).to(piece_ptr.dtype.element_ty))
    # [HEAD_SIZE]
    mean = tl.sum(k, axis=0) / tl.minimum(seq_len - block * BLOCK, BLOCK)
    tl.store(mean_ptr + row * HEAD_SIZE + offs_dim, _clamped(mean).to(mean_ptr.dtype.element_ty))


def block_mean(
    kv: KeyValues, schedule: Schedule, out: torch.Tensor | None = None, pieces: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean key of each block of each scheduled request.

    Args:
        pieces: [G, schedule.num_mean_rows, pieces of a block, D] in float16, to which the mean key of each piece of a
            whole block is written.

    Returns:
        out, [G, schedule.num_mean_rows, D] in float16, made if None.
    """
    k, _ = kv.codes()
    head_size = k.shape[3]
    if out is None:
        out = k.new_empty((kv.num_heads, schedule.num_mean_rows, head_size), dtype=MEAN_DTYPE)
    rows = schedule.requests
    for requests in (rows,) if len(rows) <= MAX_REQUESTS else rows.split(MAX_REQUESTS):
        grid = (schedule.max_key_blocks, kv.num_heads, len(requests))
        launch_kernel(
            _block_mean_kernel,
            grid,
            k,
            out,
            pieces,
            kv.block_table,
            requests,
            kv.k_scale,
            *k.stride()[:3],
            kv.table_stride,
            scale_stride(kv.k_scale),
            out.shape[1],
            HEAD_SIZE=head_size,
            BLOCK=BLOCK_SIZE,
            PAGE_SIZE=kv.page_size,
            PIECES=0 if pieces is None else pieces.shape[2],
            FP8=kv.fp8,
            FP8_NATIVE=has_e4m3_instruction(k.device),
            num_warps=4,
        )
    return out
