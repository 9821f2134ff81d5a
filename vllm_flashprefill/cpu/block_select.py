"""Stages 1 to 3 on the CPU, batched: the same result as `select_blocks_ref`, some query blocks at a time."""

from __future__ import annotations

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.cpu.blocks import in_blocks

# Logits of the query blocks that are scored together take at most this many bytes.
LOGIT_BYTES = 2 << 20


def block_select_cpu(
    q: torch.Tensor, k: torch.Tensor, *, prompt_len: int, config: FlashPrefillConfig, softmax_scale: float
) -> torch.Tensor:
    """Pool, score and select for one sequence.

    Args:
        q: [T, H, D], queries of this chunk. k: [S, G, D], keys of the whole sequence so far.
        prompt_len: tokens of the whole prompt, later chunks included.

    Returns:
        [H, NQ, NK] bool, for the query blocks that the chunk touches and all key blocks.
    """
    (num_tokens, num_heads, head_size), (seq_len, num_kv_heads, _) = q.shape, k.shape
    block_size, context_len = config.block_size, seq_len - num_tokens
    first, num_key_blocks = context_len // block_size, -(-seq_len // block_size)
    ends = (torch.arange(1, num_key_blocks + 1) * block_size).clamp(max=seq_len)
    i, j = torch.arange(first, num_key_blocks)[:, None], torch.arange(num_key_blocks)
    tail = -(-prompt_len // block_size) - config.num_dense_tail_blocks
    always = (j < config.num_sink_blocks) | (i - j < config.num_window_blocks) | (i >= tail)

    # [G, D, NK] and [H, NQ, B, D]
    sums = in_blocks(k.float(), 0, num_key_blocks, block_size).sum(dim=2)
    means = (sums / ends.diff(prepend=ends.new_zeros(1))[:, None]).transpose(1, 2)
    blocks = in_blocks(q, context_len % block_size, len(i), block_size)

    kept = torch.zeros(num_heads, len(i), num_key_blocks, dtype=torch.bool)
    at_once = max(1, LOGIT_BYTES // (4 * num_heads * block_size * num_key_blocks))
    for some in torch.arange(len(i)).split(at_once):
        stop = first + int(some[-1]) + 1
        # [H, n, B, stop]
        s = blocks[:, some].float().view(num_kv_heads, -1, len(some) * block_size, head_size) @ means[:, None, :, :stop]
        s = softmax_scale * s.view(num_heads, len(some), block_size, stop)
        positions = i[some] * block_size + torch.arange(block_size)
        in_chunk = (positions >= context_len) & (positions < seq_len)
        score = (_share if config.row_share else _score)(s, positions, in_chunk, ends[:stop], i[some])
        least = config.limit * (1 if config.row_share else score.amax(dim=-1, keepdim=True))
        kept[:, some, :stop] = score >= least
    return (kept | always) & (j <= i)


def _score(s, positions, in_chunk, ends, own) -> torch.Tensor:
    """[H, n, NK], the sum over a query block's rows, each of the blocks that it sees whole, over the largest term."""
    s.masked_fill_((ends > positions[..., None] + 1) | ~in_chunk[..., None], -torch.inf)
    return (s - s.amax(dim=(2, 3), keepdim=True)).exp_().sum(dim=2)


def _share(s, positions, in_chunk, ends, own) -> torch.Tensor:
    """[H, n, NK], the mean over a query block's rows of their shares of the blocks before it."""
    s.masked_fill_((torch.arange(len(ends)) >= own)[:, None], -torch.inf)
    share = s.softmax(dim=-1).nan_to_num_(0.0) * in_chunk[..., None]
    return share.sum(dim=2) / in_chunk.sum(dim=1)[:, None]
