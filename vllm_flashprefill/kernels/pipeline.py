"""The four stages one after another, and the scratch they share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.block_mean import MEAN_DTYPE, block_mean
from vllm_flashprefill.kernels.block_select import block_select, score_scratch
from vllm_flashprefill.kernels.schedule import Schedule
from vllm_flashprefill.kernels.sparse_attention import sparse_attention
from vllm_flashprefill.kernels.workspace import Workspace


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
    block_counts: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    mark: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Pool, score, select and attend for the scheduled sequences.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone.
        k, v: [batch, tokens, G, D], or with a block table the caches [num_pages, page_size, G, D]. e4m3 if their
            dtype is that or uint8.
        block_table: [rows, max pages] int32.
        block_counts: [2] int64; the key blocks kept, and those visible, of all query blocks and heads are added.
        workspace: where scratch comes from; allocated for this call if None.
        k_scale, v_scale: float32 of one element or [G], what e4m3 keys and values are multiplied by; 1 if None.
        mark: called before the first stage, and after each selection and each attention, which take turns.

    Returns:
        out.
    """
    workspace = workspace or Workspace(q.device)
    workspace.rewind()
    if mark is not None:
        mark()
    mean = workspace.empty((k.shape[2], schedule.num_mean_rows, k.shape[3]), MEAN_DTYPE)
    block_mean(k, schedule, block_table, k_scale=k_scale, out=mean)
    scores = score_scratch(q, schedule, workspace)
    lists, counts = list_scratch(q, schedule, workspace)
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
            block_counts=block_counts,
        )
        if mark is not None:
            mark()
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
        if mark is not None:
            mark()
    return out


def list_scratch(
    q: torch.Tensor, schedule: Schedule, workspace: Workspace | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch for the block lists and their lengths, large enough for each slab."""
    num_heads = q.shape[2]
    slots = max(slab.list_slots for slab in schedule.slabs)
    pairs = max(slab.num_items for slab in schedule.slabs)
    empty = (workspace or Workspace(q.device)).empty
    return empty((slots * num_heads,), torch.int32), empty((pairs * num_heads,), torch.int32)
