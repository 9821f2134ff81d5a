"""Sparse prefill attention for PyTorch tensors: check the arguments, then run the four stages.

On a GPU the stages are the Triton kernels of `vllm_flashprefill.kernels`, on the caller's stream and without
waiting for it; on the CPU they are PyTorch's own operators, in `vllm_flashprefill.cpu`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_flashprefill.checks import (
    check_block_counts,
    check_compute_dtype,
    check_paged,
    check_tensors,
    checked_bounds,
    checked_scale,
)
from vllm_flashprefill.config import MAX_INTEGER, FlashPrefillConfig
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest, StepPlan


def flash_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: FlashPrefillConfig | None = None,
    softmax_scale: float | None = None,
    prompt_len: int | None = None,
    out: torch.Tensor | None = None,
    block_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal sparse attention of a batch of equally long prompts, or of the same chunk of each.

    Args:
        q: [batch, T, H, D], the last T tokens of each sequence. k, v: [batch, S, G, D], S >= T.
        config: which blocks to keep; FlashPrefillConfig() if None. Routing options (`min_sparse_tokens`,
            `num_dense_layers`) do not apply here, and `compute_dtype` has to be "auto".
        softmax_scale: factor on the logits; 1 / sqrt(D) if None.
        prompt_len: tokens of each whole prompt, later chunks included; S if None.
        out: [batch, T, H, D] to write to.
        block_counts: [2] int64 on q's device; the key blocks kept, and those visible, of all query blocks and
            heads are added to it.

    Returns:
        [batch, T, H, D] in q's dtype.

    Raises:
        ValueError: an argument the kernels cannot take; the message names it.
    """
    check_tensors(q, k, v, out, rank=4)
    check_compute_dtype(config, q, k)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: batch is {k.shape[0]}, but q's is {q.shape[0]}")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"k: {k.shape[1]} tokens are fewer than q's {q.shape[1]}")
    check_block_counts(block_counts, q)
    seq_len = k.shape[1]
    prompt_len = seq_len if prompt_len is None else prompt_len
    if not seq_len <= prompt_len <= MAX_INTEGER:
        raise ValueError(f"prompt_len: {prompt_len} is not from k's {seq_len} tokens to {MAX_INTEGER}")
    softmax_scale = checked_scale(softmax_scale, q)
    out = torch.empty_like(q) if out is None else out
    if q.shape[0] == 0 or q.shape[1] == 0:
        return out
    plan = _batch_plan(*q.shape[:2], seq_len, prompt_len)
    return _run_stages(
        q, KeyValues(k, v), plan, config, softmax_scale=softmax_scale, out=out, block_counts=block_counts
    )


def flash_prefill_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | Sequence[int],
    *,
    config: FlashPrefillConfig | None = None,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal sparse attention of whole prompts packed one after another.

    Args:
        q: [total, H, D]. k, v: [total, G, D].
        cu_seqlens: [sequences + 1] integers, where each prompt starts; the last is total. The kernels' grids are
            made from them on the host: give them on the CPU, since a copy on the GPU must be waited for.
        config, softmax_scale, out: as of `flash_prefill`.

    Returns:
        [total, H, D] in q's dtype.

    Raises:
        ValueError: an argument the kernels cannot take; the message names it.
    """
    check_tensors(q, k, v, out, rank=3)
    check_compute_dtype(config, q, k)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: {k.shape[0]} tokens, but q has {q.shape[0]}")
    bounds = checked_bounds(cu_seqlens, q.shape[0])
    softmax_scale = checked_scale(softmax_scale, q)
    out = torch.empty_like(q) if out is None else out
    plan = _packed_plan(tuple(bounds))
    _run_stages(q[None], KeyValues(k[None], v[None]), plan, config, softmax_scale=softmax_scale, out=out[None])
    return out


def flash_prefill_paged(
    q: torch.Tensor,
    kv: KeyValues,
    plan: StepPlan,
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
    """Causal sparse attention of a step's sparse requests, whose keys and values are all in the cache.

    Args:
        q: [tokens of the step, H, D]; float8_e4m3fn only with a cache in e4m3.
        kv: the cache in pages, of a multiple of 16 tokens; on the CPU of any strides. In q's dtype, or e4m3; then the
            kernels clamp q to float16's range. The table's entries are not checked, since that would wait for the
            GPU: each page of a sparse request must be one of the cache's.
        plan: which requests are sparse; what the GPU needs of it is uploaded by its first use.
        config: as of `flash_prefill`; `compute_dtype` "fp8" takes a cache in e4m3, on a Hopper GPU with heads of 64 or
            128. Queries of 16 bits are then rounded to e4m3, clamped to its range.
        q_scale: positive float32 of one element or [G], what e4m3 queries are multiplied by, those of a KV head's
            group alike; 1 if None.
        sinks: [H] of 16 or 32 bits, a logit of each head that takes part in the softmax and has no value (attention
            sinks); selection does without it.
        out: [tokens of the step, H, D], in 16 bits where q is e4m3; rows of other requests are left alone.
        block_counts: as of `flash_prefill`.
        workspace: where the GPU's scratch comes from; allocated for this call if None.
        mark: called before the first stage, and after each selection and each attention, which take turns.

    Returns:
        out.

    Raises:
        ValueError: an argument the kernels cannot take; the message names it.
    """
    check_paged(q, kv, plan, out, q_scale, sinks, block_counts)
    check_compute_dtype(config, q, kv.k)
    softmax_scale = checked_scale(softmax_scale, q)
    if plan.sparse:
        options = dict(q_scale=q_scale, sinks=sinks, block_counts=block_counts, workspace=workspace, mark=mark)
        _run_stages(q[None], kv, plan, config, softmax_scale=softmax_scale, out=out[None], **options)
    return out


def _run_stages(q: torch.Tensor, kv: KeyValues, plan: StepPlan, config: FlashPrefillConfig | None, **options: Any):
    """The pipeline of q's device; arguments as of it."""
    config = config or FlashPrefillConfig()
    if q.device.type == "cpu":
        from vllm_flashprefill.cpu.pipeline import run_stages

        return run_stages(q, kv, plan.sparse, config=config, **options)
    if q.device.type != "cuda":
        raise ValueError(f"q: must be on a CPU or a CUDA GPU, not on {q.device}")

    from vllm_flashprefill.kernels.pipeline import run_stages
    from vllm_flashprefill.kernels.schedule import schedule_step

    schedule = schedule_step(plan, q.shape[2], config.num_dense_tail_blocks, q.device)
    # Triton launches on the current device, which need not be q's.
    with torch.cuda.device_of(q):
        return run_stages(q, kv, schedule, config=config, **options)


# Kept for the next layers, which attend to the same lengths, as is what the GPU was given of them.
@functools.lru_cache(maxsize=8)
def _batch_plan(batch: int, query_len: int, seq_len: int, prompt_len: int) -> StepPlan:
    lengths = query_len, seq_len - query_len, prompt_len
    return StepPlan(tuple(SparseRequest(i, 0, *lengths, batch=i) for i in range(batch)))


@functools.lru_cache(maxsize=8)
def _packed_plan(bounds: tuple[int, ...]) -> StepPlan:
    prompts = enumerate(itertools.pairwise(bounds))
    return StepPlan(tuple(SparseRequest(i, a, b - a, 0, b - a, kv_start=a) for i, (a, b) in prompts))
