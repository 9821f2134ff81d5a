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

    # [G, D, NK], [G, NK, pieces, D] and [H, NQ, B, D]
    keys = in_blocks(k.float(), 0, num_key_blocks, block_size)
    means = (keys.sum(dim=2) / ends.diff(prepend=ends.new_zeros(1))[:, None]).transpose(1, 2)
    if config.piece_size:
        pieces = keys.view(num_kv_heads, num_key_blocks, -1, config.piece_size, head_size).mean(dim=3)
    queries = in_blocks(q, context_len % block_size, len(i), block_size)
    positions = i * block_size + torch.arange(block_size)
    in_chunk = (positions >= context_len) & (positions < seq_len)

    def logits(some: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[H, n, B, keys], -inf for rows outside the chunk."""
        s = (queries[:, some].float() * softmax_scale).view(num_kv_heads, -1, head_size) @ keys
        s = s.view(num_heads, len(some), block_size, -1)
        return s if in_chunk[some].all() else s.masked_fill_(~in_chunk[some][..., None], -torch.inf)

    kept = torch.zeros(num_heads, len(i), num_key_blocks, dtype=torch.bool)
    row_bytes = 4 * num_heads * block_size * num_key_blocks * max(1, config.num_pieces)
    for some in torch.arange(len(i)).split(max(1, LOGIT_BYTES // row_bytes)):
        start, stop = first + int(some[0]), first + int(some[-1]) + 1
        earlier = j[:stop] < i[some]
        s = logits(some, means[:, :, :stop])
        # Rows see whole what ends before them, of their own block at most the last row; with pieces, that is left out.
        s[..., start:].masked_fill_(ends[start:stop] > positions[some][..., None] + 1, -torch.inf)
        score = _score(s, earlier if config.piece_size else j[:stop] <= i[some])
        if config.piece_size:
            candidate = (score >= config.candidate_alpha * score.amax(dim=-1, keepdim=True)) & earlier
            # Blocks that are candidates of no head and none of these query blocks are not looked at.
            looked_at = candidate.any(dim=(0, 1)).nonzero().flatten()
            score = torch.zeros_like(score)
            if len(looked_at):
                s = logits(some, pieces[:, looked_at].flatten(1, 2).transpose(1, 2))
                score[:, :, looked_at] = _score_pieces(s, candidate[:, :, looked_at])
        kept[:, some, :stop] = score >= config.alpha * score.amax(dim=-1, keepdim=True)
    return (kept | always) & (j <= i)


def _score(s: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[H, n, blocks], the sum over rows of exp(s), over the largest term; 0 for blocks that do not count.

    Args:
        s: [H, n, B, blocks], overwritten.
        counted: [n, blocks] bool.
    """
    largest = s.amax(dim=2).masked_fill(~counted, -torch.inf).amax(dim=2, keepdim=True)
    return s.sub_(largest[..., None]).exp_().sum(dim=2).masked_fill_(~counted, 0.0)


def _score_pieces(s: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[H, n, blocks], the largest over rows and pieces of exp(s), as a fraction of the row's largest.

    Args:
        s: [H, n, B, blocks * pieces].
        counted: [H, n, blocks] bool; the others have 0.
    """
    largest = s.unflatten(3, (counted.shape[-1], -1)).amax(dim=4).masked_fill_(~counted[:, :, None], -torch.inf)
    least = torch.finfo(largest.dtype).min
    return (largest - largest.amax(dim=3, keepdim=True).clamp(min=least)).amax(dim=2).exp()
