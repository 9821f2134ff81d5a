"""Tokens cut into blocks."""

from __future__ import annotations

import torch


def in_blocks(x: torch.Tensor, lead: int, num_blocks: int, block_size: int) -> torch.Tensor:
    """[tokens, heads, D] to [heads, num_blocks, block_size, D], the first token at row `lead` of block 0."""
    num_tokens, num_heads, head_size = x.shape
    blocks = x.new_zeros(num_heads, num_blocks * block_size, head_size)
    blocks[:, lead : lead + num_tokens] = x.transpose(0, 1)
    return blocks.view(num_heads, num_blocks, block_size, head_size)
