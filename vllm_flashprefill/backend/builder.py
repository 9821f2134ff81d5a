"""The part of the metadata builder that no vLLM version changes: plan the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from vllm_flashprefill.backend.batch import first_request, host_is_prefilling, host_seq_lens, select_requests
from vllm_flashprefill.backend.layer_routing import check_layer_names
from vllm_flashprefill.backend.prompt_lengths import prompt_lengths, watch
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.counters import recorder
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
        check_layer_names(self.vllm_config.compilation_config.static_forward_context, self.flashprefill_config)

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
