"""Values of each key block, transposed: of an e4m3 product the tensor cores want the tokens side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE
from vllm_flashprefill.kernels import columns
from vllm_flashprefill.kernels.block_mean import MAX_REQUESTS
from vllm_flashprefill.kernels.launch import launch_kernel
from vllm_flashprefill.kernels.schedule import Schedule
from vllm_flashprefill.kernels.sparse_attention import _token_offsets
from vllm_flashprefill.key_values import KeyValues


@triton.jit
def _load_words(
    words_ptr, tokens, seq_len, table_row_ptr, first_token, stride_page, stride_token,
    WORDS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """[tokens, WORDS] words of 4 columns; of tokens past the sequence 0."""
    mask = tokens < seq_len
    offs = _token_offsets(tokens, mask, table_row_ptr, first_token, stride_page, stride_token, PAGE_SIZE)
    return tl.load(words_ptr + offs[:, None] + tl.arange(0, WORDS)[None, :], mask=mask[:, None], other=0)


@triton.jit
def _byte(x, n: tl.constexpr):
    return (x >> (8 * n)) & 0xFF


@triton.jit(do_not_specialize=["num_mean_rows", "stride_table"])
def _value_tiles_kernel(
    words_ptr, tiles_ptr, block_table_ptr, requests_ptr, stride_vp: tl.int64, stride_vt, stride_vg, stride_table,
    num_mean_rows,
    HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """words_ptr: the values, as words of 4 codes; tiles_ptr and strides likewise."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request_ptr = requests_ptr + tl.program_id(2) * columns.REQUEST_COLUMNS
    seq_len = tl.load(request_ptr + columns.QUERY_LEN) + tl.load(request_ptr + columns.CONTEXT_LEN)
    if block * BLOCK >= seq_len:
        return
    table_row_ptr = block_table_ptr
    first_token = 0
    words_ptr += kv_head.to(tl.int64) * stride_vg
    if PAGE_SIZE > 0:
        table_row_ptr += tl.load(request_ptr + columns.TABLE_ROW).to(tl.int64) * stride_table
    else:
        words_ptr += tl.load(request_ptr + columns.BATCH).to(tl.int64) * stride_vp
        first_token = tl.load(request_ptr + columns.KV_START)
    WORDS: tl.constexpr = HEAD_SIZE // 4
    offs_word = tl.arange(0, BLOCK // 4)
    tokens = block * BLOCK + offs_word // 4 * 16 + offs_word % 4 * 2
    a = _load_words(words_ptr, tokens, seq_len, table_row_ptr, first_token, stride_vp, stride_vt, WORDS, PAGE_SIZE)
    b = _load_words(words_ptr, tokens + 1, seq_len, table_row_ptr, first_token, stride_vp, stride_vt, WORDS, PAGE_SIZE)
    c = _load_words(words_ptr, tokens + 8, seq_len, table_row_ptr, first_token, stride_vp, stride_vt, WORDS, PAGE_SIZE)
    d = _load_words(words_ptr, tokens + 9, seq_len, table_row_ptr, first_token, stride_vp, stride_vt, WORDS, PAGE_SIZE)
    row = kv_head.to(tl.int64) * num_mean_rows + tl.load(request_ptr + columns.MEAN_START) + block
    # [BLOCK // 4, WORDS]
    to_ptrs = tiles_ptr + row * (HEAD_SIZE * BLOCK // 4) + offs_word[:, None]
    to_ptrs += tl.arange(0, WORDS)[None, :] * BLOCK
    for n in tl.static_range(4):
        word = _byte(a, n) | (_byte(b, n) << 8) | (_byte(c, n) << 16) | (_byte(d, n) << 24)
        tl.store(to_ptrs + n * (BLOCK // 4), word)


def value_tiles(kv: KeyValues, schedule: Schedule, out: torch.Tensor) -> torch.Tensor:
    """The values of each block of each scheduled request, transposed; those past a sequence are 0.

    Of 16 tokens, 0 to 15, the order is 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15: it is that of the
    probabilities in the Hopper kernel's registers.

    Args:
        kv: in e4m3, each token of a head at a multiple of 4 bytes.
        out: [G, schedule.num_mean_rows, D, BLOCK_SIZE] uint8.

    Returns:
        out.
    """
    _, v = kv.codes()
    words = v.view(torch.int32)
    rows = schedule.requests
    for requests in (rows,) if len(rows) <= MAX_REQUESTS else rows.split(MAX_REQUESTS):
        launch_kernel(
            _value_tiles_kernel,
            (schedule.max_key_blocks, kv.num_heads, len(requests)),
            words,
            out.view(torch.int32),
            kv.block_table,
            requests,
            *words.stride()[:3],
            kv.table_stride,
            out.shape[1],
            HEAD_SIZE=v.shape[3],
            BLOCK=BLOCK_SIZE,
            PAGE_SIZE=kv.page_size,
            num_warps=4,
        )
    return out
