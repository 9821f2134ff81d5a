"""Stages 1 to 3 on the CPU, batched: the same result as `select_blocks_ref`, some query blocks at a time."""

from __future__ import annotations

import math

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.cpu.blocks import in_blocks

# Logits of the query blocks that are scored together take at most this many bytes.
LOGIT_BYTES = 2 << 20
# In place of a fraction of 0, whose logarithm is none.
TINY = 1e-300


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

    # [G, D, NK], [G, D, NK * pieces] and [H, NQ, B, D]
    keys = in_blocks(k.float(), 0, num_key_blocks, block_size)
    means = (keys.sum(dim=2) / ends.diff(prepend=ends.new_zeros(1))[:, None]).transpose(1, 2)
    if config.piece_size:
        pieces = keys.view(num_kv_heads, -1, config.piece_size, head_size).mean(dim=2).transpose(1, 2)
    queries = in_blocks(q, context_len % block_size, len(i), block_size)
    positions = i * block_size + torch.arange(block_size)
    in_chunk = (positions >= context_len) & (positions < seq_len)

    def logits(some: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[H, n, B, keys], -inf for rows outside the chunk."""
        s = queries[:, some].float().view(num_kv_heads, -1, head_size) @ keys
        s = s.view(num_heads, len(some), block_size, -1) * softmax_scale
        return s.masked_fill_(~in_chunk[some][..., None], -torch.inf)

    kept = torch.zeros(num_heads, len(i), num_key_blocks, dtype=torch.bool)
    row_bytes = 4 * num_heads * block_size * num_key_blocks * max(1, config.num_pieces)
    for some in torch.arange(len(i)).split(max(1, LOGIT_BYTES // row_bytes)):
        stop = first + int(some[-1]) + 1
        s = logits(some, means[:, :, :stop])
        # Its own is scored by the row that sees it whole; with pieces, which are for earlier ones, by none.
        s.masked_fill_(
            ends[:stop] > (i[some] * block_size if config.piece_size else positions[some] + 1)[..., None], -torch.inf
        )
        score = s.logsumexp(dim=2)
        if config.piece_size:
            least = score.amax(dim=-1, keepdim=True) + math.log(config.candidate_alpha or TINY)
            s = logits(some, pieces[:, :, : stop * config.num_pieces]).unflatten(3, (stop, -1))
            score = s.logsumexp(dim=(2, 4)).masked_fill_((score < least) | score.isinf(), -torch.inf)
        kept[:, some, :stop] = score >= score.amax(dim=-1, keepdim=True) + math.log(config.alpha or TINY)
    return (kept | always | (config.alpha == 0)) & (j <= i)
