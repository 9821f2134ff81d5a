"""The part of the metadata builder that no vLLM version changes: plan the step, split the batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from vllm_flashprefill.backend.prompt_lengths import prompt_lengths, watch
from vllm_flashprefill.backend.stats import recorder
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.schedule import upload
from vllm_flashprefill.plan import EMPTY_PLAN, StepPlan, plan_step


@dataclasses.dataclass(frozen=True)
class FlashPrefillStep:
    """What a sparse layer needs of a step, carried by vLLM's metadata as its attribute ``flashprefill``.

    Attributes:
        plan: which requests are sparse.
        block_table: [num_reqs, max pages] int32.
        dense_rows: which rows of the packed queries are dense requests': a slice, or [their tokens] int64 where
            they do not lie together; None where there are none.
        dense_metadata: vLLM's own metadata of the dense requests alone; None where there are none.
    """

    plan: StepPlan
    block_table: torch.Tensor | None
    dense_rows: slice | torch.Tensor | None
    dense_metadata: Any


# Of a batch that is vLLM's own and is not counted.
NO_STEP = FlashPrefillStep(EMPTY_PLAN, None, None, None)


class FlashPrefillBuilderMixin:
    """Goes before vLLM's metadata builder class; `build` adds a `FlashPrefillStep` to what vLLM built.

    A step with no sparse request gets the metadata vLLM builds and nothing else is computed for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch_model_runners()
        self.flashprefill_config = FlashPrefillConfig.from_vllm(self.vllm_config)

    def watch_model_runners(self) -> None:
        """Have this vLLM's model runners say how long prompts are."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        watch(GPUModelRunner)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        recorder().step_done()
        # A draft model's metadata is what vLLM builds fast, and alters from draft to draft: a plan would not follow.
        if not fast_build and self._can_plan(common_attn_metadata):
            metadata.flashprefill = self._plan_step(common_attn_metadata)
        return metadata

    def _can_plan(self, common: Any) -> bool:
        # Attention may be causal for all requests, none, or by request.
        if getattr(common, "causal", True) is not True or getattr(common, "mm_req_doc_ranges", None) is not None:
            return False
        # vLLM's builder for layers with static sinks puts tokens before each request that host lengths do not count.
        if getattr(self, "sink_len", 0):
            return False
        # A context-parallel builder keeps the whole batch's lengths in a buffer, which metadata of a part would spoil.
        return getattr(self, "dcp_world_size", 1) == 1

    def _plan_step(self, common: Any) -> FlashPrefillStep | None:
        num_reqs = common.num_reqs
        query_start_loc = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        seq_lens = host_seq_lens(common)
        if seq_lens is None:
            # A draft model's batch, in vLLM's second model runner.
            return None
        seq_lens = seq_lens[:num_reqs].numpy()
        try:
            plan = plan_step(
                query_start_loc,
                seq_lens,
                self.flashprefill_config,
                prompt_lengths(seq_lens - np.diff(query_start_loc), first_request(common)),
                host_is_prefilling(common),
            )
        except ValueError:
            # A dummy batch (an idle data-parallel rank's) need not describe requests.
            return None
        dense_rows = dense_metadata = None
        if plan.sparse and len(plan.dense):
            part, dense_rows = select_requests(common, plan.dense)
            dense_metadata = self.build_dense(part, plan)
        return FlashPrefillStep(plan, common.block_table_tensor, dense_rows, dense_metadata)

    def build_dense(self, part: Any, plan: StepPlan) -> Any:
        """vLLM's metadata for the dense requests of a mixed step.

        Args:
            part: the ``CommonAttentionMetadata`` of those requests alone.
        """
        return super().build(0, part)


def host_seq_lens(common: Any) -> torch.Tensor | None:
    """[num_reqs or more] int32 on the CPU, tokens of each request up to and including this step; None if not there.

    Exact for prefills. vLLM 0.24.0 may not know on the host how many drafted tokens were accepted: then there is a
    bound alone, which counts all of them, and its property ``seq_lens_cpu`` would wait for a copy from the device.
    """
    fields = vars(common)
    for name in ("_seq_lens_cpu", "seq_lens_cpu", "seq_lens_cpu_upper_bound"):
        if fields.get(name) is not None:
            return fields[name]
    return None


def host_is_prefilling(common: Any) -> np.ndarray | None:
    """[num_reqs] bool, which requests still prefill; None where vLLM does not say so on the host."""
    is_prefilling = getattr(common, "is_prefilling", None)
    if is_prefilling is None or is_prefilling.device.type != "cpu":
        return None
    return is_prefilling[: common.num_reqs].numpy()


def first_request(common: Any) -> int:
    """The row of a micro-batch's first request in the step's batch, 0 where this is the step's batch.

    vLLM does not say it, but the micro-batch's block table is a part of the step's in memory.
    """
    table = common.block_table_tensor
    return table.storage_offset() // table.stride(0) if table.stride(0) else 0


def select_requests(common: Any, requests: np.ndarray) -> tuple[Any, slice | torch.Tensor]:
    """The part of a batch that some of its requests make up. Does not wait for the device.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
        requests: [n] int64, rows of the batch in ascending order.

    Returns:
        (``CommonAttentionMetadata`` of those n requests, their rows in the packed queries as in `FlashPrefillStep`).
    """
    starts = common.query_start_loc_cpu.numpy()
    lens = np.diff(starts[: common.num_reqs + 1])[requests]
    new_starts = np.concatenate([[0], np.cumsum(lens)])
    row_numbers = np.repeat(starts[requests] - new_starts[:-1], lens) + np.arange(new_starts[-1])

    device = common.query_start_loc.device
    query_start_loc_cpu = torch.from_numpy(new_starts).to(common.query_start_loc_cpu.dtype)
    requests_cpu = torch.from_numpy(requests)
    requests_device = upload(requests_cpu, device)
    if len(row_numbers) and row_numbers[-1] - row_numbers[0] + 1 == len(row_numbers):
        rows = slice(int(row_numbers[0]), int(row_numbers[-1]) + 1)
    else:
        rows = upload(torch.from_numpy(row_numbers), device)
    seq_lens_cpu = host_seq_lens(common)[requests_cpu]
    changes = dict(
        query_start_loc=upload(query_start_loc_cpu, device),
        query_start_loc_cpu=query_start_loc_cpu,
        seq_lens=common.seq_lens[requests_device],
        seq_lens_cpu=seq_lens_cpu,
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_computed_tokens_cpu=seq_lens_cpu - torch.from_numpy(lens).to(seq_lens_cpu.dtype),
        num_reqs=len(requests),
        num_actual_tokens=int(new_starts[-1]),
        max_query_len=int(lens.max()),
        max_seq_len=int(seq_lens_cpu.max()),
        block_table_tensor=common.block_table_tensor[requests_device],
        slot_mapping=common.slot_mapping[rows],
        # Made by vLLM 0.24.0 when asked for.
        _seq_lens_cpu=None,
        _num_computed_tokens_cpu=None,
        _num_computed_tokens_cache=None,
    )
    if getattr(common, "is_prefilling", None) is not None:
        changes["is_prefilling"] = common.is_prefilling[requests_cpu]
    if getattr(common, "positions", None) is not None:
        changes["positions"] = common.positions[rows]
    known = {field.name for field in dataclasses.fields(common)}
    return dataclasses.replace(common, **{k: v for k, v in changes.items() if k in known}), rows
