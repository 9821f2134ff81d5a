"""How long each request's prefill is, which vLLM's attention metadata does not say.

The dense tail belongs to the prompt, not to the chunk, so a step's plan needs to know where each prompt ends.
vLLM's model runners know. `watch` makes a runner leave here, at every step, the object that says it, and the metadata
builder reads it through `prompt_lengths`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model runner knows lengths.

    Attributes:
        method: one that runs once a step, after the batch is known and before metadata is built.
        batch: (runner, what the method returned) to the object that knows; the runner itself must not be kept alive.
        lengths: that object, when metadata is built, to (tokens computed before this step, tokens known), each
            [num_reqs] integers.
    """

    method: str
    batch: Callable[[Any, Any], Any]
    lengths: Callable[[Any], tuple[np.ndarray, np.ndarray]]


INPUT_BATCH = Source(
    "_may_reorder_batch",
    lambda runner, _: runner.input_batch,
    lambda batch: (batch.num_computed_tokens_cpu[: batch.num_reqs], batch.num_tokens_no_spec[: batch.num_reqs]),
)
# vLLM's second model runner (vllm.v1.worker.gpu.model_runner).
PREPARED_INPUTS = Source(
    "prepare_inputs",
    lambda _, inputs: inputs,
    lambda inputs: (inputs.num_computed_tokens_np, inputs.prefill_len_np),
)

_watched: tuple[Source, Any] | None = None
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
        _watched = source, source.batch(self, result)
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


def prompt_lengths(num_computed_tokens: np.ndarray) -> np.ndarray | None:
    """Tokens known of each request: its prompt, and what it had generated if it is being recomputed.

    Args:
        num_computed_tokens: [num_reqs] integers of the batch that metadata is being built for; requests of padding
            may follow the batch's own.

    Returns:
        [num_reqs] int32, or None where the watched batch is not this one (a dummy run, a part of a batch).
    """
    if _watched is None:
        return None
    source, batch = _watched
    computed, known = source.lengths(batch)
    num_reqs = len(computed)
    if num_reqs > len(num_computed_tokens) or not np.array_equal(computed, num_computed_tokens[:num_reqs]):
        return None
    lengths = np.zeros(len(num_computed_tokens), dtype=np.int32)
    lengths[:num_reqs] = known
    return lengths
