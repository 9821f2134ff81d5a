"""The part of the metadata builder that no vLLM version changes: plan the step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from vllm_flashprefill.backend.batch import (
    Rows,
    first_request,
    host_is_prefilling,
    host_seq_lens,
    select_requests,
    unknown_fields,
)
from vllm_flashprefill.backend.layer_routing import check_layer_names, impl_dense_reason
from vllm_flashprefill.backend.prompt_lengths import prompt_lengths, watch
from vllm_flashprefill.backend.self_check import check_layers
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.counters import recorder
from vllm_flashprefill.plan import EMPTY_PLAN, StepPlan, plan_step
from vllm_flashprefill.routing import DenseReason

logger = logging.getLogger("vllm.flashprefill")

# Fields of vLLM's batches that a warning has named in this process.
_named_fields: set[str] = set()


@dataclasses.dataclass(frozen=True)
class FlashPrefillStep:
    """What a sparse layer needs of a step, carried by vLLM's metadata as its attribute ``flashprefill``.

    Attributes:
        plan: which requests are sparse.
        block_table: [num_reqs, max pages] int32.
        dense_rows: which rows of the packed queries are dense requests': a slice, or [their tokens] int64 where
            they do not lie together; None where there are none.
        dense_requests: likewise which rows of the block table.
        dense_metadata: vLLM's own metadata of the dense requests alone; None where there are none.
    """

    plan: StepPlan
    block_table: torch.Tensor | None
    dense_rows: Rows | None
    dense_requests: Rows | None
    dense_metadata: Any


# Of a batch that is vLLM's own and is not counted.
NO_STEP = FlashPrefillStep(EMPTY_PLAN, None, None, None, None)


class FlashPrefillBuilderMixin:
    """Goes before vLLM's metadata builder class; `build` adds a `FlashPrefillStep` to what vLLM built.

    A step with no sparse request gets the metadata vLLM builds and nothing else is computed for it. A version's class
    says how that vLLM lays out a cache (`new_cache`).
    """

    _plans = True
    # Query heads of its layers where short appends are dearer than others, as of `plan_step`.
    append_heads: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Impls of layers of which it is not known yet whether they are always dense; none where all are planned for.
        self._undecided: list[Any] = []
        self._has_windows = is_windowed(kwargs.get("kv_cache_spec", args[0] if args else None))
        self.watch_model_runners()
        self.flashprefill_config = FlashPrefillConfig.from_vllm(self.vllm_config)
        check_layer_names(self.vllm_config.compilation_config.static_forward_context, self.flashprefill_config)
        self.prepare_layers()
        impls = [layer.impl for layer in self.own_layers()]
        self._undecided = [impl for impl in impls if not (impl.never_sparse() or impl.self_check_failed)]
        # For a draft model's, or those of a vLLM that is not as expected, what a plan reads may not be there either.
        self._plans = not impls or bool(self._undecided)
        if getattr(self, "supports_update_block_table", False):
            # Its metadata becomes that of other groups of layers, which may be sparse where its own are not.
            self._undecided = []

    def prepare_layers(self) -> None:
        """What is done for this builder's layers before any request."""
        check_layers(self, self.own_layers())

    def own_layers(self) -> Iterator[Any]:
        """vLLM's layers that this builds metadata for, as far as they are ours.

        vLLM 0.10.0 does not say which: all, or those with a sliding window if the cache is for such.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        names = getattr(self, "layer_names", None)
        for name in layers if names is None else names:
            impl = getattr(layers.get(name), "impl", None)
            if not hasattr(impl, "flashprefill_config"):
                continue
            if names is None and self._has_windows and impl_dense_reason(impl) is not DenseReason.SLIDING_WINDOW:
                continue
            yield layers[name]

    def watch_model_runners(self) -> None:
        """Have this vLLM's model runners say how long prompts are."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        watch(GPUModelRunner)

    def new_cache(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """A KV cache as this vLLM makes it, with anything in it."""
        raise NotImplementedError

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        recorder().step_done()
        # A draft model's metadata is what vLLM builds fast, and alters from draft to draft: a plan would not follow.
        if not fast_build and self._may_be_sparse() and self.can_plan(common_attn_metadata):
            unknown = unknown_fields(common_attn_metadata)
            if unknown:
                _name_fields(unknown)
                metadata.flashprefill_reason = DenseReason.UNKNOWN_BATCH
            else:
                metadata.flashprefill = self._plan_step(common_attn_metadata)
        return metadata

    def _may_be_sparse(self) -> bool:
        """Whether any of this builder's layers may be sparse, which those tell that have seen their cache."""
        while self._undecided and (always_dense := self._undecided[-1].always_dense) is not None:
            if always_dense:
                self._undecided.pop()
                self._plans = bool(self._undecided)
            else:
                self._undecided = []
        return self._plans

    def can_plan(self, common: Any) -> bool:
        """Whether a batch's attention is what a plan is made for."""
        # Attention may be causal for all requests, none, or by request.
        if getattr(common, "causal", True) is not True:
            return False
        # Tokens of images that see each other both ways, by request; a batch of text alone may have empty lists.
        if any((getattr(common, "mm_req_doc_ranges", None) or {}).values()):
            return False
        # A sliding window over what requests generate (R-SWA), whose lengths a part's metadata would write over the
        # whole batch's.
        if getattr(self, "rswa_window", None) is not None:
            return False
        # vLLM's builder for layers with static sinks puts tokens before each request that host lengths do not count.
        if getattr(self, "sink_len", 0):
            return False
        # A context-parallel builder keeps the whole batch's lengths in a buffer, which metadata of a part would spoil.
        return getattr(self, "dcp_world_size", 1) == 1

    def _plan_step(self, common: Any) -> FlashPrefillStep | None:
        num_reqs = common.num_reqs
        query_start_loc = common.query_start_loc_cpu.numpy()[: num_reqs + 1]
        seq_lens = host_seq_lens(common)
        if seq_lens is None:
            # A draft model's batch, in vLLM's second model runner.
            return None
        seq_lens = seq_lens.numpy()[:num_reqs]
        is_prefilling, prompt_lens = host_is_prefilling(common), None
        if is_prefilling is None or is_prefilling.any():
            computed = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
            prompt_lens = prompt_lengths(computed, first_request(common))
        try:
            plan = plan_step(
                query_start_loc, seq_lens, self.flashprefill_config, prompt_lens, is_prefilling, self.append_heads
            )
        except ValueError:
            # A dummy batch (an idle data-parallel rank's) need not describe requests.
            return None
        dense_rows = dense_requests = dense_metadata = None
        if plan.sparse and len(plan.dense):
            part, dense_rows, dense_requests = select_requests(common, plan.dense)
            dense_metadata = self.build_dense(part, plan)
        return FlashPrefillStep(plan, common.block_table_tensor, dense_rows, dense_requests, dense_metadata)

    def build_dense(self, part: Any, plan: StepPlan) -> Any:
        """vLLM's metadata for the dense requests of a mixed step.

        Args:
            part: the ``CommonAttentionMetadata`` of those requests alone.
        """
        return super().build(0, part)


def is_windowed(kv_cache_spec: Any) -> bool:
    """Whether a cache, as vLLM's ``KVCacheSpec`` has it, is of layers with a sliding window alone."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return isinstance(kv_cache_spec, SlidingWindowSpec)


def _name_fields(fields: list[str]) -> None:
    for field in fields:
        if field not in _named_fields:
            _named_fields.add(field)
            logger.warning(
                "FlashPrefill: batches in which vLLM sets %s stay dense, since it is not known what that means", field
            )
