"""vLLM's description of a batch: its lengths on the host, and parts of it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import numpy as np
import torch

from vllm_flashprefill.device import upload


def batch_class(builder_class: type) -> type:
    """vLLM's ``CommonAttentionMetadata``, as the module of the vLLM class that a builder of ours goes before has it.

    Raises:
        AttributeError: it has none.
    """
    return sys.modules[vllms_class(builder_class).__module__].CommonAttentionMetadata


def vllms_class(ours: type) -> type:
    """The vLLM class that one of ours goes before."""
    return next(cls for cls in ours.__mro__ if cls.__module__.startswith("vllm."))


# Where the host has the lengths of sequences, best first.
HOST_LENGTHS = ("_seq_lens_cpu", "seq_lens_cpu", "seq_lens_cpu_upper_bound")


def host_seq_lens(common: Any) -> torch.Tensor | None:
    """[num_reqs or more] int32 on the CPU, tokens of each request up to and including this step; None if not there.

    Exact for prefills. vLLM 0.24.0 may not know on the host how many drafted tokens were accepted: then there is a
    bound alone, which counts all of them, and its property ``seq_lens_cpu`` would wait for a copy from the device.
    """
    fields = vars(common)
    for name in HOST_LENGTHS:
        if fields.get(name) is not None:
            return fields[name]
    return None


def host_is_prefilling(common: Any) -> np.ndarray | None:
    """[num_reqs] bool, which requests still prefill; None where vLLM does not say so on the host."""
    is_prefilling = getattr(common, "is_prefilling", None)
    if is_prefilling is None or is_prefilling.device.type != "cpu":
        return None
    return is_prefilling.numpy()[: common.num_reqs]


def first_request(common: Any) -> int:
    """The row of a micro-batch's first request in the step's batch, 0 where this is the step's batch.

    vLLM does not say it, but the micro-batch's block table is a part of the step's in memory.
    """
    table = common.block_table_tensor
    offset = table.storage_offset()
    return offset and table.stride(0) and offset // table.stride(0)


# Of a batch, what holds for all of it, so for each part; and what vLLM has worked out of it when asked.
_OF_THE_BATCH = {"causal", "logits_indices_padded", "num_logits_indices", "max_logits_per_req"}
_WORKED_OUT = {
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
}
# Of each request, on the host.
_OF_EACH_REQUEST = {"is_prefilling", "req_idx", "replayssm_decode_base_cpu"}
# What `select_requests` works out anew.
_SELECTED = {
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "seq_lens_cpu",
    "seq_lens_cpu_upper_bound",
    "num_computed_tokens_cpu",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "block_table_tensor",
    "slot_mapping",
    "positions",
    "mm_req_doc_ranges",
}


def unknown_fields(common: Any) -> list[str]:
    """Names of what vLLM says of this batch that a part of it would not have right, or that may change attention."""
    unknown = []
    for name, default in _other_fields(type(common)):
        value = getattr(common, name)
        if value is not None and value is not default:
            unknown.append(name)
    return unknown


@functools.cache
def _other_fields(batch_class: type) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of those that are not known."""
    known = _OF_THE_BATCH | _WORKED_OUT | _OF_EACH_REQUEST | _SELECTED
    return tuple((field.name, field.default) for field in dataclasses.fields(batch_class) if field.name not in known)


@functools.cache
def _field_names(batch_class: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(batch_class))


# Rows of something, those that lie together without a copy.
Rows = slice | torch.Tensor


def select_requests(common: Any, requests: np.ndarray) -> tuple[Any, Rows, Rows]:
    """The part of a batch that some of its requests make up. Does not wait for the device.

    Requests that lie together are views of the batch, and nothing is uploaded for them.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
        requests: [n] int64, rows of the batch in ascending order, n > 0.

    Returns:
        (``CommonAttentionMetadata`` of those n requests, their rows in the packed queries, their rows in the batch),
        rows as in `FlashPrefillStep`.
    """
    starts = common.query_start_loc_cpu.numpy()
    first, after = int(requests[0]), int(requests[-1]) + 1
    if after - first == len(requests):
        on_host = on_device = slice(first, after)
        rows = slice(int(starts[first]), int(starts[after]))
        lens, num_tokens = starts[first + 1 : after + 1] - starts[first:after], rows.stop - rows.start
        query_start_loc, query_start_loc_cpu = (
            x[first : after + 1] for x in (common.query_start_loc, common.query_start_loc_cpu)
        )
        if rows.start:
            query_start_loc, query_start_loc_cpu = query_start_loc - rows.start, query_start_loc_cpu - rows.start
    else:
        lens = starts[requests + 1] - starts[requests]
        new_starts = np.concatenate([[0], np.cumsum(lens)])
        num_tokens = int(new_starts[-1])
        row_numbers = np.repeat(starts[requests] - new_starts[:-1], lens) + np.arange(num_tokens)
        on_host = torch.from_numpy(requests)
        uploaded = torch.from_numpy(np.concatenate([requests, row_numbers, new_starts]))
        uploaded = upload(uploaded, common.query_start_loc.device)
        on_device, rows, query_start_loc = uploaded.split([len(requests), num_tokens, len(new_starts)])
        if row_numbers[-1] - row_numbers[0] + 1 == num_tokens:
            rows = slice(int(row_numbers[0]), int(row_numbers[-1]) + 1)
        query_start_loc = query_start_loc.to(common.query_start_loc.dtype)
        query_start_loc_cpu = torch.from_numpy(new_starts).to(common.query_start_loc_cpu.dtype)
    seq_lens_cpu = host_seq_lens(common)[on_host]
    changes = dict(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=common.seq_lens[on_device],
        seq_lens_cpu=seq_lens_cpu,
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_computed_tokens_cpu=seq_lens_cpu - torch.from_numpy(lens).to(seq_lens_cpu.dtype),
        num_reqs=len(requests),
        num_actual_tokens=num_tokens,
        max_query_len=int(lens.max()),
        max_seq_len=int(seq_lens_cpu.max()),
        block_table_tensor=common.block_table_tensor[on_device],
        slot_mapping=common.slot_mapping[rows],
        # Ranges of images, of which a batch that is planned has none.
        mm_req_doc_ranges=None,
        **dict.fromkeys(_WORKED_OUT),
    )
    for name in _OF_EACH_REQUEST:
        value = getattr(common, name, None)
        if value is not None:
            changes[name] = value[on_host if torch.is_tensor(value) or isinstance(on_host, slice) else requests]
    if getattr(common, "positions", None) is not None:
        changes["positions"] = common.positions[rows]
    known = _field_names(type(common))
    return dataclasses.replace(common, **{k: v for k, v in changes.items() if k in known}), rows, on_device
