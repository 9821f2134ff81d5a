"""How long each request's prefill is, which vLLM's attention metadata does not say.

The dense tail belongs to the prompt, not to the chunk, so a step's plan needs to know where each prompt ends.
vLLM's model runners know. `watch` makes a runner leave the lengths here, at every step, and the metadata builder reads
them through `prompt_lengths`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Lengths = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model runner knows lengths.

    Attributes:
        method: one that runs once a step, after the batch is known and before metadata is built.
        lengths: (runner, what the method returned, its arguments) to (tokens computed before this step, of this step,
            and known), each [num_reqs] integers that nothing changes later.
    """

    method: str
    lengths: Callable[..., Lengths]


def _input_batch_lengths(runner: Any, _: Any, scheduler_output: Any) -> Lengths:
    batch = runner.input_batch
    rows = slice(batch.num_reqs)
    if scheduler_output.total_num_scheduled_tokens == batch.num_reqs:
        scheduled = np.ones(batch.num_reqs, dtype=np.int64)
    else:
        of_request = scheduler_output.num_scheduled_tokens.__getitem__
        scheduled = np.fromiter(map(of_request, batch.req_ids[rows]), np.int64, batch.num_reqs)
    # For hybrid models vLLM 0.24.0 takes back refused drafts here after it has worked out the step's lengths.
    return batch.num_computed_tokens_cpu[rows].copy(), scheduled, batch.num_tokens_no_spec[rows].copy()


def _prepared_lengths(_: Any, inputs: Any, *args: Any, **kwargs: Any) -> Lengths:
    return inputs.num_computed_tokens_np, inputs.num_scheduled_tokens, inputs.prefill_len_np


INPUT_BATCH = Source("_may_reorder_batch", _input_batch_lengths)
# vLLM's second model runner (vllm.v1.worker.gpu.model_runner).
PREPARED_INPUTS = Source("prepare_inputs", _prepared_lengths)

# Of the step that runs, as of `Source.lengths`.
_watched: Lengths | None = None
_wrapped: list[tuple[type, Source]] = []


def watch(model_runner_class: type, source: Source = INPUT_BATCH) -> None:
    """Wrap the source's method of the class; once, however often it is called.

    Raises:
        RuntimeError: the class has no such method.
    """
    original = getattr(model_runner_class, source.method, None)
    if original is None:
        raise RuntimeError(f"{model_runner_class.__name__} of this vLLM has no {source.method} to watch")
    if hasattr(original, "_flashprefill_original"):
        return

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _watched
        result = original(self, *args, **kwargs)
        _watched = source.lengths(self, result, *args, **kwargs)
        return result

    watched._flashprefill_original = original
    setattr(model_runner_class, source.method, watched)
    _wrapped.append((model_runner_class, source))


def unwatch(model_runner_class: type, source: Source = INPUT_BATCH) -> None:
    """Undo `watch`."""
    global _watched
    _watched = None
    wrapped = getattr(model_runner_class, source.method, None)
    if hasattr(wrapped, "_flashprefill_original"):
        setattr(model_runner_class, source.method, wrapped._flashprefill_original)


def unwatch_all() -> None:
    """Undo every `watch` of this process."""
    while _wrapped:
        unwatch(*_wrapped.pop())


def prompt_lengths(num_computed_tokens: np.ndarray, first_request: int | None = None) -> np.ndarray | None:
    """Tokens known of each request: its prompt, and what it had generated if it is being recomputed.

    Args:
        num_computed_tokens: [num_reqs] integers of the batch that metadata is being built for; requests of padding
            may follow the batch's own.
        first_request: where that batch is a micro-batch, its first request's row in the step's batch. The micro-batch
            before may have begun that request.

    Returns:
        [num_reqs] int32, or None where the step's batch is not this one, nor this a part of it (a dummy run).
    """
    if _watched is None:
        return None
    computed, scheduled, known = _watched
    if first_request is not None:
        rows = slice(first_request, first_request + len(num_computed_tokens))
        computed, scheduled, known = computed[rows], scheduled[rows], known[rows]
    num_reqs = len(computed)
    if not 0 < num_reqs <= len(num_computed_tokens):
        return None
    given = num_computed_tokens[:num_reqs]
    if different := np.count_nonzero(computed != given):
        is_begun = first_request is not None and computed[0] < given[0] < computed[0] + scheduled[0]
        if different > 1 or not is_begun:
            return None
    if num_reqs == len(num_computed_tokens):
        return known.astype(np.int32, copy=False)
    lengths = np.zeros(len(num_computed_tokens), dtype=np.int32)
    lengths[:num_reqs] = known
    return lengths
