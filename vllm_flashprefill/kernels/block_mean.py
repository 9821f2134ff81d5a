"""Stage 1, pool: the mean key of each block, from plain or paged keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels.schedule import Schedule

# Means are kept in float16 whatever the keys are: 8 times finer than bfloat16, and a mean key beyond its range
# (65504) is no real model's; such a value is clamped.
MEAN_DTYPE = torch.float16


@triton.jit(do_not_specialize=["num_mean_rows", "stride_table"])
def _block_mean_kernel(
    k_ptr,
    mean_ptr,
    block_table_ptr,
    requests_ptr,
    stride_kp: tl.int64,
    stride_kt,
    stride_kg,
    stride_table,
    num_mean_rows,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request_ptr = requests_ptr + tl.program_id(2) * 8
    seq_len = tl.load(request_ptr + 2) + tl.load(request_ptr + 3)
    if block * BLOCK >= seq_len:
        return

    tokens = block * BLOCK + tl.arange(0, BLOCK)
    mask_tokens = tokens < seq_len
    if PAGE_SIZE > 0:
        table_row = tl.load(request_ptr + 5).to(tl.int64)
        pages = tl.load(block_table_ptr + table_row * stride_table + tokens // PAGE_SIZE, mask=mask_tokens, other=0)
        offs_tokens = pages.to(tl.int64) * stride_kp + (tokens % PAGE_SIZE).to(tl.int64) * stride_kt
    else:
        batch = tl.load(request_ptr).to(tl.int64)
        offs_tokens = batch * stride_kp + (tl.load(request_ptr + 4) + tokens).to(tl.int64) * stride_kt
    offs_dim = tl.arange(0, HEAD_SIZE)
    # [BLOCK, HEAD_SIZE]
    k_ptrs = k_ptr + offs_tokens[:, None] + kv_head.to(tl.int64) * stride_kg + offs_dim[None, :]
    k = tl.load(k_ptrs, mask=mask_tokens[:, None], other=0.0).to(tl.float32)
    # [HEAD_SIZE]
    mean = tl.sum(k, axis=0) / tl.minimum(seq_len - block * BLOCK, BLOCK)
    mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0)
    row = kv_head.to(tl.int64) * num_mean_rows + tl.load(request_ptr + 6) + block
    tl.store(mean_ptr + row * HEAD_SIZE + offs_dim, mean.to(mean_ptr.dtype.element_ty))


def block_mean(
    k: torch.Tensor, schedule: Schedule, block_table: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean key of each block of each scheduled sequence.

    Args:
        k: [batch, tokens, G, D], or with a block table the cache [num_pages, page_size, G, D]; any strides but
            the last, which is 1.
        block_table: [rows, max pages] int32.

    Returns:
        [G, schedule.num_mean_rows, D] in float16.
    """
    num_kv_heads, head_size = k.shape[2:]
    if out is None:
        out = k.new_empty((num_kv_heads, schedule.num_mean_rows, head_size), dtype=MEAN_DTYPE)
    grid = (schedule.max_key_blocks, num_kv_heads, len(schedule.requests))
    _block_mean_kernel[grid](
        k,
        out,
        block_table,
        schedule.requests,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        0 if block_table is None else block_table.stride(0),
        out.shape[1],
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_SIZE,
        PAGE_SIZE=0 if block_table is None else k.shape[1],
        num_warps=4,
    )
    return out
