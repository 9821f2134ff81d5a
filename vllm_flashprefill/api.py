"""Sparse prefill attention for PyTorch tensors: check the arguments, then run the four stages.

On a GPU the stages are the Triton kernels of `vllm_flashprefill.kernels`, on the caller's stream and without
waiting for it; on the CPU they are the reference.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.plan import StepPlan
from vllm_flashprefill.reference import (
    FP8_DTYPES,
    flash_prefill_paged_ref,
    flash_prefill_ref,
    flash_prefill_varlen_ref,
)

HEAD_SIZES = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
PAGE_SIZE_MULTIPLE = 16


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
            `num_dense_layers`) do not apply here.
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
    _check_tensors(q, k, v, out, rank=4)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: batch is {k.shape[0]}, but q's is {q.shape[0]}")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"k: {k.shape[1]} tokens are fewer than q's {q.shape[1]}")
    _check_block_counts(block_counts, q)
    seq_len = k.shape[1]
    prompt_len = seq_len if prompt_len is None else prompt_len
    if prompt_len < seq_len:
        raise ValueError(f"prompt_len: {prompt_len} is less than k's {seq_len} tokens")
    config, softmax_scale = config or FlashPrefillConfig(), _scale(softmax_scale, q)
    out = torch.empty_like(q) if out is None else out
    if q.shape[0] == 0 or q.shape[1] == 0:
        return out
    if not q.is_cuda:
        for i in range(len(q)):
            out[i] = flash_prefill_ref(
                q[i],
                k[i],
                v[i],
                config=config,
                softmax_scale=softmax_scale,
                prompt_len=prompt_len,
                block_counts=block_counts,
            )
        return out

    from vllm_flashprefill.kernels.schedule import Sequence, cached_schedule

    schedule = cached_schedule(
        tuple(Sequence(q.shape[1], seq_len - q.shape[1], prompt_len, batch=i) for i in range(len(q))),
        num_heads=q.shape[2],
        num_dense_tail_blocks=config.num_dense_tail_blocks,
        device=q.device,
    )
    return _run_stages(
        q, k, v, schedule, config=config, softmax_scale=softmax_scale, out=out, block_counts=block_counts
    )


def flash_prefill_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | SequenceOf[int],
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
    _check_tensors(q, k, v, out, rank=3)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: {k.shape[0]} tokens, but q has {q.shape[0]}")
    bounds = _bounds(cu_seqlens, q.shape[0])
    config, softmax_scale = config or FlashPrefillConfig(), _scale(softmax_scale, q)
    out = torch.empty_like(q) if out is None else out
    if not q.is_cuda:
        out.copy_(flash_prefill_varlen_ref(q, k, v, torch.tensor(bounds), config=config, softmax_scale=softmax_scale))
        return out

    from vllm_flashprefill.kernels.schedule import Sequence, cached_schedule

    schedule = cached_schedule(
        tuple(Sequence(b - a, 0, b - a, query_start=a, kv_start=a) for a, b in itertools.pairwise(bounds)),
        num_heads=q.shape[1],
        num_dense_tail_blocks=config.num_dense_tail_blocks,
        device=q.device,
    )
    _run_stages(q[None], k[None], v[None], schedule, config=config, softmax_scale=softmax_scale, out=out[None])
    return out


def flash_prefill_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: StepPlan,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    out: torch.Tensor,
    block_counts: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    mark: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Causal sparse attention of a step's sparse requests, whose keys and values are all in the cache.

    Args:
        q: [tokens of the step, H, D].
        k_cache, v_cache: [num_pages, page_size, G, D], page_size a multiple of 16; any strides but the last.
            In q's dtype, or e4m3, as float8_e4m3fn or as the uint8 that vLLM keeps it in; then the kernels clamp q
            to float16's range.
        block_table: [num_reqs, max pages] int32, on q's device. Its entries are not checked, since that would wait
            for the GPU: each page of a sparse request must be one of the cache's.
        plan: which requests are sparse; what the GPU needs of it is uploaded by its first use.
        out: [tokens of the step, H, D]; rows of other requests are left alone.
        block_counts: [2] int64 on q's device; the key blocks kept, and those visible, of all query blocks and
            heads are added to it.
        workspace: where the GPU's scratch comes from; allocated for this call if None.
        k_scale, v_scale: positive float32 of one element or [G], on q's device: what e4m3 keys and values are
            multiplied by; 1 if None.
        mark: called on a GPU before the first stage, and after each selection and each attention, which take turns.

    Returns:
        out.

    Raises:
        ValueError: an argument the kernels cannot take; the message names it.
    """
    _check_rank("q", q, 3)
    _check_rank("k_cache", k_cache, 4)
    _check_rank("v_cache", v_cache, 4)
    _check_heads(q, k_cache, v_cache, names=("k_cache", "v_cache"), dtypes=(q.dtype, *FP8_DTYPES))
    _check_out(q, out)
    if k_cache.shape[1] < 1 or k_cache.shape[1] % PAGE_SIZE_MULTIPLE:
        raise ValueError(f"k_cache: page size must be a multiple of {PAGE_SIZE_MULTIPLE}, not {k_cache.shape[1]}")
    if k_cache.shape[0] < 1:
        raise ValueError("k_cache: has no page")
    _check_kv_scale("k_scale", k_scale, k_cache)
    _check_kv_scale("v_scale", v_scale, v_cache)
    _check_block_counts(block_counts, q)
    _check_rank("block_table", block_table, 2)
    if block_table.device != q.device:
        raise ValueError(f"block_table: is on {block_table.device}, q on {q.device}")
    if block_table.dtype != torch.int32:
        raise ValueError(f"block_table: must be int32, not {block_table.dtype}")
    if block_table.stride(1) != 1:
        raise ValueError("block_table: its last dimension must be contiguous")
    _scale(softmax_scale, q)
    for request in plan.sparse:
        pages = -(-request.seq_len // k_cache.shape[1])
        if not 0 <= request.index < block_table.shape[0] or pages > block_table.shape[1]:
            raise ValueError(
                f"block_table: shape {tuple(block_table.shape)} is too short for request {request.index}, "
                f"which has {pages} pages"
            )
        if request.query_len < 1 or request.context_len < 0:
            raise ValueError(f"plan: request {request.index} has no queries, or a negative context")
        if not 0 <= request.query_start <= q.shape[0] - request.query_len:
            raise ValueError(f"plan: request {request.index} is not within q's {q.shape[0]} tokens")
    if not plan.sparse:
        return out
    if not q.is_cuda:
        return flash_prefill_paged_ref(
            q,
            k_cache,
            v_cache,
            block_table,
            plan,
            config=config,
            softmax_scale=softmax_scale,
            out=out,
            block_counts=block_counts,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    from vllm_flashprefill.kernels.schedule import schedule_step

    schedule = schedule_step(
        plan, num_heads=q.shape[1], num_dense_tail_blocks=config.num_dense_tail_blocks, device=q.device
    )
    _run_stages(
        q[None],
        k_cache,
        v_cache,
        schedule,
        config=config,
        softmax_scale=softmax_scale,
        out=out[None],
        block_table=block_table,
        block_counts=block_counts,
        workspace=workspace,
        k_scale=k_scale,
        v_scale=v_scale,
        mark=mark,
    )
    return out


def _run_stages(q: torch.Tensor, *args, **options) -> torch.Tensor:
    from vllm_flashprefill.kernels.pipeline import run_stages

    # Triton launches on the current device, which need not be q's.
    with torch.cuda.device_of(q):
        return run_stages(q, *args, **options)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, *, rank: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x, rank)
    _check_heads(q, k, v, names=("k", "v"))
    if out is not None:
        _check_out(q, out)


def _check_rank(name: str, x: torch.Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name}: must have {rank} dimensions, not {x.dim()}")


def _check_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    names: tuple[str, str],
    dtypes: tuple[torch.dtype, ...] = (),
) -> None:
    """Dtypes, devices, heads, head sizes and strides of q, k and v; dtypes: what k may have, q's if none is given."""
    # The reference takes any on the CPU; a meta tensor gets the GPU's answer.
    if (q.device.type != "cpu" and q.dtype not in DTYPES) or not q.is_floating_point():
        raise ValueError(f"q: dtype must be bfloat16 or float16, not {q.dtype}")
    if q.device.type != "cpu" and q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"q: head dim must be one of {HEAD_SIZES}, not {q.shape[-1]}")
    if q.stride(-1) != 1:
        raise ValueError("q: its last dimension must be contiguous")
    for name, x in zip(("q", *names), (q, k, v), strict=True):
        if q.device.type != "cpu" and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which the kernels do not give; call under torch.no_grad()")
    for name, x in zip(names, (k, v), strict=True):
        if x.dtype not in (dtypes or (q.dtype,)):
            raise ValueError(f"{name}: dtype is {x.dtype}, q's is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: is on {x.device}, q on {q.device}")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name}: head dim is {x.shape[-1]}, q's is {q.shape[-1]}")
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: its last dimension must be contiguous")
    if v.dtype != k.dtype:
        raise ValueError(f"{names[1]}: dtype is {v.dtype}, {names[0]}'s is {k.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"{names[1]}: shape {tuple(v.shape)} is not {names[0]}'s {tuple(k.shape)}")
    if q.shape[-2] == 0:
        raise ValueError("q: has no heads")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{names[0]}: {k.shape[-2]} KV heads do not divide q's {q.shape[-2]} heads")


def _check_kv_scale(name: str, scale: torch.Tensor | None, cache: torch.Tensor) -> None:
    if scale is None:
        return
    if cache.dtype not in FP8_DTYPES:
        raise ValueError(f"{name}: is for an e4m3 cache, not for {cache.dtype}")
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        raise ValueError(f"{name}: must be a float32 tensor, not {getattr(scale, 'dtype', type(scale).__name__)}")
    if scale.device != cache.device:
        raise ValueError(f"{name}: is on {scale.device}, the cache on {cache.device}")
    if scale.numel() != 1 and scale.shape != cache.shape[2:3]:
        raise ValueError(f"{name}: must have one element or {cache.shape[2]}, not shape {tuple(scale.shape)}")


def _check_out(q: torch.Tensor, out: torch.Tensor) -> None:
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or out.stride(-1) != 1:
        raise ValueError("out: must have q's shape, dtype and device, and a contiguous last dimension")


def _check_block_counts(block_counts: torch.Tensor | None, q: torch.Tensor) -> None:
    if block_counts is not None and (
        block_counts.shape != (2,) or block_counts.dtype != torch.int64 or block_counts.device != q.device
    ):
        raise ValueError("block_counts: must be two int64 on q's device")


def _scale(softmax_scale: float | None, q: torch.Tensor) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: must be positive and finite, not {softmax_scale}")
    return softmax_scale


def _bounds(cu_seqlens: torch.Tensor | SequenceOf[int], total: int) -> list[int]:
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens: must be a row of int32 or int64, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        cu_seqlens = cu_seqlens.tolist()
    try:
        bounds = [operator.index(bound) for bound in cu_seqlens]
    except TypeError:
        raise ValueError("cu_seqlens: must hold integers") from None
    if len(bounds) < 2 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens: must increase and hold at least two entries, not {bounds}")
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(f"cu_seqlens: must go from 0 to q's {total} tokens, not {bounds[0]} to {bounds[-1]}")
    return bounds
