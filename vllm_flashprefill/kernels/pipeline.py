"""The four stages one after another, and the scratch they share."""

from __future__ import annotations

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.block_mean import block_mean
from vllm_flashprefill.kernels.block_select import block_select, score_scratch
from vllm_flashprefill.kernels.schedule import Schedule
from vllm_flashprefill.kernels.sparse_attention import sparse_attention


def run_stages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: Schedule,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    out: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pool, score, select and attend for the scheduled sequences.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone.
        k, v: [batch, tokens, G, D], or with a block table the caches [num_pages, page_size, G, D]. e4m3 if their
            dtype is that or uint8.
        block_table: [rows, max pages] int32.
        k_scale, v_scale: float32 of one element or [G], what e4m3 keys and values are multiplied by; 1 if None.

    Returns:
        out.
    """
    mean = block_mean(k, schedule, block_table, k_scale=k_scale)
    scores = score_scratch(q, schedule)
    lists, counts = list_scratch(q, schedule)
    for slab in schedule.slabs:
        block_select(
            q,
            mean,
            schedule,
            slab,
            config=config,
            softmax_scale=softmax_scale,
            lists=lists,
            counts=counts,
            scores=scores,
        )
        sparse_attention(
            q,
            k,
            v,
            schedule,
            slab,
            lists=lists,
            counts=counts,
            softmax_scale=softmax_scale,
            out=out,
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    return out


def list_scratch(q: torch.Tensor, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch for the block lists and their lengths, large enough for each slab."""
    num_heads = q.shape[2]
    slots = max(slab.list_slots for slab in schedule.slabs)
    pairs = max(slab.num_items for slab in schedule.slabs)
    return (
        q.new_empty(slots * num_heads, dtype=torch.int32),
        q.new_empty(pairs * num_heads, dtype=torch.int32),
    )
