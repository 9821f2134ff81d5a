"""The four stages one after another, request by request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.cpu.block_select import block_select_cpu
from vllm_flashprefill.cpu.sparse_attention import sparse_attention_cpu
from vllm_flashprefill.key_values import KeyValues, dequantise_queries, is_e4m3
from vllm_flashprefill.plan import SparseRequest
from vllm_flashprefill.reference import sparse_attention_fp8_ref


def run_stages(
    q: torch.Tensor,
    kv: KeyValues,
    requests: Sequence[SparseRequest],
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    block_counts: torch.Tensor | None = None,
    workspace: Any = None,
    mark: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Pool, score, select and attend for some requests; arguments as of `kernels.pipeline`, whose workspace has no use.

    Products in e4m3 are imitated, which takes longer than those in 16 bits.

    Returns:
        out.
    """
    attend = sparse_attention_cpu
    if config.compute_dtype == "fp8":
        scales = dict(q_scale=q_scale, k_scale=kv.k_scale, v_scale=kv.v_scale)
        attend = functools.partial(sparse_attention_fp8_ref, **scales)
    if mark is not None:
        mark()
    for request in requests:
        rows = (request.batch, request.query_slice)
        queries, (k, v) = q[rows], kv.of_request(request)
        if is_e4m3(q):
            queries = dequantise_queries(queries, q_scale, kv.num_heads)
        elif kv.fp8 or q.dtype.itemsize not in (2, 4):
            queries, k, v = queries.float(), k.float(), v.float()
        mask = block_select_cpu(queries, k, prompt_len=request.prompt_len, config=config, softmax_scale=softmax_scale)
        if block_counts is not None:
            block_counts += block_counts.new_tensor([int(mask.sum()), len(mask) * request.visible_blocks])
        if mark is not None:
            mark()
        attended = attend(
            queries, k, v, mask,
            context_len=request.context_len, block_size=config.block_size, softmax_scale=softmax_scale, sinks=sinks,
        )  # fmt: skip
        out[rows] = attended.to(out.dtype)
        if mark is not None:
            mark()
    return out
