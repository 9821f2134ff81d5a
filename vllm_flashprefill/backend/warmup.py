"""Compiles the kernels before serving: they are run once for each kind of layer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch

from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.flash_attn_impl import FlashAttnImplMixin
from vllm_flashprefill.backend.layer_routing import has_e4m3_cache, has_quantised_query
from vllm_flashprefill.checks import DTYPES, E4M3, PAGE_SIZE_MULTIPLE
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest, StepPlan

logger = logging.getLogger("vllm.flashprefill")

# What the kernels were compiled for in this process, and what of it they do not run for.
_compiled: set[tuple] = set()
_failed: set[tuple] = set()


def compile_kernels(
    impls: Iterable[FlashAttnImplMixin],
    new_cache: Callable[..., torch.Tensor],
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the kernels once for each kind of layer, so that no request waits for a compiler.

    Lengths, thresholds and the batch are arguments of the kernels at run time; what they are compiled for is here.
    Layers for which they fail, on a GPU with too little shared memory for one, are dense; the engine serves.
    """
    if page_size % PAGE_SIZE_MULTIPLE or dtype not in DTYPES:
        return
    for impl in impls:
        if not impl.may_be_sparse:
            continue
        config = impl.flashprefill_config
        names = ("num_pieces", "num_sink_blocks", "num_window_blocks", "compute_dtype")
        constants = tuple(getattr(config, name) for name in names)
        dtypes = dtype, has_e4m3_cache(impl), has_quantised_query(impl)
        sinks = getattr(impl, "sinks", None)
        dtypes += (None if sinks is None else sinks.dtype,)
        kind = (impl.num_heads, impl.num_kv_heads, impl.head_size, page_size, dtypes, device, constants)
        if kind not in _compiled:
            _compiled.add(kind)
            described = f"{impl.num_heads}/{impl.num_kv_heads} heads of {impl.head_size}, {dtype}, pages of {page_size}"
            described += " in e4m3" * has_e4m3_cache(impl)
            started = time.perf_counter()
            try:
                _run_kernels(impl, new_cache, page_size, dtype, device)
            except Exception as error:
                _failed.add(kind)
                logger.warning(
                    "FlashPrefill: layers with %s stay dense, since the kernels do not run for them: %s: %s",
                    described,
                    type(error).__name__,
                    error,
                )
            else:
                logger.info(
                    "FlashPrefill: compiled its kernels for %s in %.1f s", described, time.perf_counter() - started
                )
        # Builders of other layers, with pages of other sizes, may warm up for this one too.
        impl.kernels_failed |= kind in _failed


def _run_kernels(
    impl: FlashAttnImplMixin,
    new_cache: Callable[..., torch.Tensor],
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    length, append, context = 256, 128, 8192
    num_pages = -(-length // page_size)
    is_e4m3, one = has_e4m3_cache(impl), torch.ones(1, device=device)
    cache_dtype = torch.uint8 if is_e4m3 else dtype
    cache = new_cache(num_pages, page_size, impl.num_kv_heads, impl.head_size, cache_dtype, device).zero_()
    out = torch.zeros(length, impl.num_heads, impl.head_size, dtype=dtype, device=device)
    # Pages are read again and again.
    table = torch.arange(-(-(context + append) // page_size), dtype=torch.int32, device=device) % num_pages
    # A prompt, and a chunk far from its prompt's end, whose lists are split on any GPU.
    for request in (SparseRequest(0, 0, length, 0, length), SparseRequest(0, 0, append, context, 1 << 20)):
        flash_prefill_paged(
            out.to(E4M3) if has_quantised_query(impl) else torch.zeros_like(out),
            KeyValues(*impl.paged_kv(cache), table[None], *([one, one] if is_e4m3 else [])),
            StepPlan((request,)),
            config=impl.flashprefill_config,
            softmax_scale=impl.scale,
            q_scale=one if has_quantised_query(impl) else None,
            sinks=getattr(impl, "sinks", None),
            out=out,
            block_counts=torch.zeros(2, dtype=torch.int64, device=device),
        )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
