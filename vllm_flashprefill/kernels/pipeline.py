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
    kept_blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pool, score, select and attend for the scheduled sequences.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone.
        k, v: [batch, tokens, G, D], or with a block table the caches [num_pages, page_size, G, D].
        block_table: [rows, max pages] int32.
        kept_blocks: one int64 on the device, to which the number of key blocks kept is added.

    Returns:
        out.
    """
    mean = block_mean(k, schedule, block_table)
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
        if kept_blocks is not None:
            kept_blocks += counts[: slab.num_items * q.shape[2]].sum()
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
