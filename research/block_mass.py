"""Each row's exact attention to each key block, before the softmax: the Triton kernel, and the same in PyTorch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_flashprefill.config import BLOCK_SIZE

# Key blocks of a program.
STEP = 16


@triton.jit(do_not_specialize=["first_block", "context_len", "seq_len", "num_query_blocks", "num_key_blocks"])
def _block_mass_kernel(
    q_ptr, k_ptr, out_ptr, scale, first_block, context_len, seq_len, num_query_blocks, num_key_blocks,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.program_id(2) * STEP
    query_block = first_block + row_block
    if start <= query_block:
        offs = tl.arange(0, BLOCK)
        offs_dim = tl.arange(0, HEAD_SIZE)
        q_block = (head * num_query_blocks + row_block).to(tl.int64)
        # [BLOCK, HEAD_SIZE]
        q = tl.load(q_ptr + (q_block * BLOCK + offs)[:, None] * HEAD_SIZE + offs_dim[None, :])
        positions = query_block * BLOCK + offs
        mask_rows = (positions >= context_len) & (positions < seq_len)
        for block in range(start, tl.minimum(start + STEP, query_block + 1)):
            k_block = ((head // GROUP) * num_key_blocks + block).to(tl.int64)
            # [HEAD_SIZE, BLOCK]
            k = tl.load(k_ptr + (k_block * BLOCK + offs)[None, :] * HEAD_SIZE + offs_dim[:, None])
            s = tl.dot(q, k) * (scale * 1.4426950408889634)
            s = tl.where((block * BLOCK + offs)[None, :] <= positions[:, None], s, float("-inf"))
            largest = tl.max(s, axis=1)
            mass = (largest + tl.log2(tl.sum(tl.exp2(s - largest[:, None]), axis=1))) * 0.6931471805599453
            mass = tl.where(mask_rows, mass, float("-inf"))
            tl.store(out_ptr + (q_block * num_key_blocks + block) * BLOCK + offs, mass)


def block_mass(q: torch.Tensor, k: torch.Tensor, *, context_len: int, seq_len: int, scale: float) -> torch.Tensor:
    """log of each row's sum of exp(scaled logit) over the keys of each block that it sees.

    Args:
        q: [H, NQ, 128, D], the query blocks that a chunk touches, whole. k: [G, NK, 128, D], likewise.
        context_len: tokens before the chunk. seq_len: tokens up to its end.

    Returns:
        [H, NQ, 128, NK] in float32; -inf for a block that the row sees nothing of and for rows outside the chunk.
    """
    num_heads, num_query_blocks, _, head_size = q.shape
    num_kv_heads, num_key_blocks = k.shape[:2]
    shape = num_heads, num_query_blocks, num_key_blocks, BLOCK_SIZE
    out = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    _block_mass_kernel[(num_query_blocks, num_heads, -(-num_key_blocks // STEP))](
        q, k, out, scale, context_len // BLOCK_SIZE, context_len, seq_len, num_query_blocks, num_key_blocks,
        GROUP=num_heads // num_kv_heads, HEAD_SIZE=head_size, BLOCK=BLOCK_SIZE, STEP=STEP, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out.transpose(2, 3)


def block_mass_ref(q: torch.Tensor, k: torch.Tensor, *, context_len: int, seq_len: int, scale: float) -> torch.Tensor:
    """`block_mass` in plain PyTorch."""
    keys = k.float().flatten(1, 2).repeat_interleave(len(q) // len(k), dim=0)
    logits = scale * torch.einsum("hnrd,hkd->hnrk", q.float(), keys)
    rows = torch.arange(q.shape[1] * BLOCK_SIZE, device=q.device).view(-1, BLOCK_SIZE, 1)
    rows = rows + context_len // BLOCK_SIZE * BLOCK_SIZE
    hidden = (torch.arange(keys.shape[1], device=q.device) > rows) | (rows < context_len) | (rows >= seq_len)
    return logits.masked_fill(hidden, -torch.inf).unflatten(3, (-1, BLOCK_SIZE)).logsumexp(dim=-1)


def check_block_mass(device: torch.device, dtype: torch.dtype = torch.bfloat16, head_size: int = 128) -> float:
    """The largest difference between the kernel and PyTorch on random tensors, a chunk that is cut at both ends.

    Raises:
        RuntimeError: they see other blocks, or the difference is over 0.02.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        2 * torch.randn(heads, blocks, BLOCK_SIZE, head_size, generator=generator, device=device, dtype=dtype)
        for heads, blocks in ((4, 2), (2, 18))
    )
    lengths = dict(context_len=16 * BLOCK_SIZE + 20, seq_len=18 * BLOCK_SIZE - 48)
    found, expected = (run(q, k, scale=1 / math.sqrt(head_size), **lengths) for run in (block_mass, block_mass_ref))
    seen = expected > -torch.inf
    if not torch.equal(found > -torch.inf, seen):
        raise RuntimeError("the Triton kernel sees other blocks than PyTorch")
    error = float((found - expected)[seen].abs().max())
    if not error < 0.02:
        raise RuntimeError(f"the Triton kernel is off by {error}")
    return error
