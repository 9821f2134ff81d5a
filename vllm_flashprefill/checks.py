"""What the arguments of `vllm_flashprefill.api` must be; each check raises a ValueError that names the argument."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch

from vllm_flashprefill.config import MAX_INTEGER, FlashPrefillConfig
from vllm_flashprefill.key_values import FP8_DTYPES, KeyValues
from vllm_flashprefill.plan import StepPlan

HEAD_SIZES = (64, 128, 256)
# Of products in e4m3.
FP8_HEAD_SIZES = (64, 128)
HOPPER = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
PAGE_SIZE_MULTIPLE = 16
E4M3 = torch.float8_e4m3fn


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, *, rank: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, rank)
    check_heads(q, k, v)
    if out is not None:
        check_out(q, out)


def check_rank(name: str, x: torch.Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name}: must have {rank} dimensions, not {x.dim()}")


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, paged: bool = False) -> None:
    """Dtypes, devices, heads, head sizes and strides of q, k and v; paged ones may be in e4m3."""
    on_cpu = q.device.type == "cpu"
    if q.dtype == E4M3:
        if not paged or k.dtype not in FP8_DTYPES:
            raise ValueError(f"q: is {q.dtype}, which goes with paged keys in e4m3 alone, not with {k.dtype}")
    # The CPU takes any; a meta tensor gets the GPU's answer.
    elif (not on_cpu and q.dtype not in DTYPES) or not q.is_floating_point():
        raise ValueError(f"q: dtype must be bfloat16 or float16, not {q.dtype}")
    if not on_cpu and q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"q: head dim must be one of {HEAD_SIZES}, not {q.shape[-1]}")
    if q.stride(-1) != 1:
        raise ValueError("q: its last dimension must be contiguous")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which the kernels do not give; call under torch.no_grad()")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype and not (paged and x.dtype in FP8_DTYPES):
            raise ValueError(f"{name}: dtype is {x.dtype}, q's is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: is on {x.device}, q on {q.device}")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name}: head dim is {x.shape[-1]}, q's is {q.shape[-1]}")
        # vLLM's CPU caches may have a page's dimensions before its tokens.
        if x.stride(-1) != 1 and not (paged and on_cpu):
            raise ValueError(f"{name}: its last dimension must be contiguous")
    if v.dtype != k.dtype:
        raise ValueError(f"v: dtype is {v.dtype}, k's is {k.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} is not k's {tuple(k.shape)}")
    if q.shape[-2] == 0:
        raise ValueError("q: has no heads")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: {k.shape[-2]} KV heads do not divide q's {q.shape[-2]} heads")


def check_scale(name: str, scale: torch.Tensor | None, of: torch.Tensor, cache: torch.Tensor) -> None:
    """scale: what e4m3 queries, keys or values, in `of`, are multiplied by."""
    if scale is None:
        return
    if of.dtype not in FP8_DTYPES:
        raise ValueError(f"{name}: is for e4m3, not for {of.dtype}")
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        raise ValueError(f"{name}: must be a float32 tensor, not {getattr(scale, 'dtype', type(scale).__name__)}")
    if scale.device != cache.device:
        raise ValueError(f"{name}: is on {scale.device}, the cache on {cache.device}")
    if scale.numel() != 1 and scale.shape != cache.shape[2:3]:
        raise ValueError(f"{name}: must have one element or {cache.shape[2]}, not shape {tuple(scale.shape)}")


def check_out(q: torch.Tensor, out: torch.Tensor) -> None:
    dtypes = DTYPES if q.dtype == E4M3 else (q.dtype,)
    if out.shape != q.shape or out.dtype not in dtypes or out.device != q.device or out.stride(-1) != 1:
        raise ValueError(
            "out: must have q's shape, device and dtype (16 bits if q is e4m3), and a contiguous last dimension"
        )


def check_compute_dtype(config: FlashPrefillConfig | None, q: torch.Tensor, k: torch.Tensor) -> None:
    """That the products which `config` asks for can be had of these queries and keys."""
    if config is None or config.compute_dtype != "fp8":
        return
    # The CPU computes what the kernel would, for heads of any size; a meta tensor gets the GPU's answer.
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else HOPPER
    head_size = FP8_HEAD_SIZES[0] if q.device.type == "cpu" else q.shape[-1]
    if (misfit := fp8_misfit(capability, k.dtype in FP8_DTYPES, head_size)) is not None:
        raise ValueError(f"compute_dtype: {misfit}")


def fp8_misfit(capability: tuple[int, int] | None, is_e4m3: bool, head_size: int) -> str | None:
    """Why `compute_dtype` cannot be "fp8", and what to do about it; None where it can.

    Args:
        capability: the GPU's compute capability, None where there is no GPU.
        is_e4m3: whether the KV cache is in e4m3.
    """
    if capability is None or capability[0] != HOPPER[0]:
        found = "there is no GPU" if capability is None else "this one has {}.{}".format(*capability)
        return f'"fp8" is for Hopper GPUs (compute capability 9.0), and {found}; leave it at "auto"'
    if not is_e4m3:
        return '"fp8" is for KV caches in e4m3; ask vLLM for --kv-cache-dtype fp8, or leave it at "auto"'
    if head_size not in FP8_HEAD_SIZES:
        return f'"fp8" is for heads of {" or ".join(map(str, FP8_HEAD_SIZES))}, not of {head_size}; leave it at "auto"'
    return None


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor) -> None:
    if sinks is not None and (
        sinks.shape != q.shape[-2:-1]
        or not sinks.is_floating_point()
        or sinks.dtype.itemsize not in (2, 4)
        or sinks.device != q.device
        or not sinks.is_contiguous()
    ):
        raise ValueError(
            f"sinks: must be {q.shape[-2]} contiguous numbers of 16 or 32 bits on {q.device}, not "
            f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        )


def check_block_counts(block_counts: torch.Tensor | None, q: torch.Tensor) -> None:
    if block_counts is not None and (
        block_counts.shape != (2,) or block_counts.dtype != torch.int64 or block_counts.device != q.device
    ):
        raise ValueError("block_counts: must be two int64 on q's device")


def checked_scale(softmax_scale: float | None, q: torch.Tensor) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: must be positive and finite, not {softmax_scale}")
    return float(softmax_scale)


def checked_bounds(cu_seqlens: torch.Tensor | Sequence[int], total: int) -> list[int]:
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


def check_paged(
    q: torch.Tensor,
    kv: KeyValues,
    plan: StepPlan,
    out: torch.Tensor,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    block_counts: torch.Tensor | None = None,
) -> None:
    """What these are like; once for the layers of a step whose tensors are alike."""
    tensors = q, kv.k, kv.v, kv.block_table, out, kv.k_scale, kv.v_scale, q_scale, sinks, block_counts
    try:
        alike = tuple([x if x is None else (x.dtype, x.shape, x.stride(), x.device) for x in tensors])
    except AttributeError:
        # One is no tensor, as a check says below.
        alike = None
    # With gradients, it matters too which tensors require them.
    if alike in plan.checked and not torch.is_grad_enabled():
        return
    _check_paged(q, kv, plan, out, q_scale)
    check_sinks(sinks, q)
    check_block_counts(block_counts, q)
    if alike is not None:
        plan.checked.add(alike)


def _check_paged(
    q: torch.Tensor, kv: KeyValues, plan: StepPlan, out: torch.Tensor, q_scale: torch.Tensor | None
) -> None:
    check_rank("q", q, 3)
    check_rank("k", kv.k, 4)
    check_rank("v", kv.v, 4)
    check_heads(q, kv.k, kv.v, paged=True)
    check_out(q, out)
    page_size, table = kv.k.shape[1], kv.block_table
    if page_size < 1 or page_size % PAGE_SIZE_MULTIPLE:
        raise ValueError(f"k: page size must be a multiple of {PAGE_SIZE_MULTIPLE}, not {page_size}")
    if kv.k.shape[0] < 1:
        raise ValueError("k: has no page")
    for name, scale, of in (("q_scale", q_scale, q), ("k_scale", kv.k_scale, kv.k), ("v_scale", kv.v_scale, kv.v)):
        check_scale(name, scale, of, kv.k)
    if table is None:
        raise ValueError("block_table: is None, but the keys and values are in pages")
    check_rank("block_table", table, 2)
    if table.device != q.device:
        raise ValueError(f"block_table: is on {table.device}, q on {q.device}")
    if table.dtype != torch.int32:
        raise ValueError(f"block_table: must be int32, not {table.dtype}")
    if table.stride(1) != 1:
        raise ValueError("block_table: its last dimension must be contiguous")
    for request in plan.sparse:
        pages = -(-request.seq_len // page_size)
        if not 0 <= request.index < table.shape[0] or pages > table.shape[1]:
            raise ValueError(
                f"block_table: shape {tuple(table.shape)} is too short for request {request.index}, "
                f"which has {pages} pages"
            )
        if request.query_len < 1 or request.context_len < 0:
            raise ValueError(f"plan: request {request.index} has no queries, or a negative context")
        if not request.seq_len <= request.prompt_len <= MAX_INTEGER:
            raise ValueError(
                f"plan: request {request.index}'s prompt_len {request.prompt_len} is not from its "
                f"{request.seq_len} tokens to {MAX_INTEGER}"
            )
        if not 0 <= request.query_start <= q.shape[0] - request.query_len:
            raise ValueError(f"plan: request {request.index} is not within q's {q.shape[0]} tokens")
