"""The four stages one after another, and the scratch they share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.block_mean import MEAN_DTYPE, block_mean
from vllm_flashprefill.kernels.block_select import block_select, score_scratch
from vllm_flashprefill.kernels.parts import join_parts, part_scratch
from vllm_flashprefill.kernels.schedule import Schedule
from vllm_flashprefill.kernels.sparse_attention import sparse_attention, takes_fp8_products
from vllm_flashprefill.kernels.value_tiles import value_tiles
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.key_values import KeyValues, codes, to_e4m3


def run_stages(
    q: torch.Tensor,
    kv: KeyValues,
    schedule: Schedule,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    block_counts: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    mark: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Pool, score, select and attend for the scheduled requests.

    Args:
        q, out: [batch, tokens, H, D]; rows of out that are no scheduled query are left alone.
        q_scale, sinks, block_counts, workspace, mark: as of `api.flash_prefill_paged`.

    Returns:
        out.
    """
    q = codes(q)
    workspace = workspace or Workspace(q.device)
    workspace.rewind()
    if mark is not None:
        mark()
    mean = workspace.empty((kv.num_heads, schedule.num_mean_rows, q.shape[3]), MEAN_DTYPE)
    pieces = None
    if config.num_pieces:
        pieces = workspace.empty((*mean.shape[:2], config.num_pieces, mean.shape[2]), MEAN_DTYPE)
    block_mean(kv, schedule, mean, pieces)
    scores = score_scratch(q, schedule, config.piece_size > 0, workspace)
    lists, counts = list_scratch(q, schedule, workspace)
    parts = part_scratch(q, schedule, workspace)
    shared = dict(lists=lists, counts=counts, parts=parts, softmax_scale=softmax_scale, q_scale=q_scale)
    select = functools.partial(block_select, pieces=pieces, config=config, scores=scores, block_counts=block_counts)
    tiles = None
    if config.compute_dtype == "fp8" and takes_fp8_products(q, kv):
        tiles = workspace.empty((*mean.shape, config.block_size), torch.uint8)
        value_tiles(kv, schedule, tiles)
    attend = functools.partial(sparse_attention, value_tiles=tiles)
    attended = q if tiles is None else to_e4m3(q)
    try:
        for slab in schedule.slabs:
            select(q, mean, schedule, slab, **shared)
            if mark is not None:
                mark()
            attend(attended, kv, schedule, slab, sinks=sinks, out=out, **shared)
            if slab.part_tiles:
                join_parts(parts, schedule, slab, counts=counts, sinks=sinks, out=out)
            if mark is not None:
                mark()
    except BaseException:
        # Parts are counted that nothing joins, and whoever kept the schedule may try again.
        schedule.counters.zero_()
        raise
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
