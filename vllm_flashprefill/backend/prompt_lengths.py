"""How long each request's prefill is, which vLLM's attention metadata does not say.

The dense tail belongs to the prompt, not to the chunk, so a step's plan needs to know where each prompt ends.
vLLM's model runner knows: its input batch holds the tokens known of each request. `watch` makes the runner
leave its input batch here at every step, and the metadata builder reads it through `prompt_lengths`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_input_batch: Any = None


def watch(model_runner_class: type) -> None:
    """Wrap ``_may_reorder_batch``, which runs once a step after the batch is updated and before metadata is built.

    Raises:
        RuntimeError: the class has no such method.
    """
    original = getattr(model_runner_class, "_may_reorder_batch", None)
    if original is None:
        raise RuntimeError(f"{model_runner_class.__name__} of this vLLM has no _may_reorder_batch to watch")
    if hasattr(original, "_flashprefill_original"):
        return

    def _may_reorder_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _input_batch
        result = original(self, *args, **kwargs)
        _input_batch = self.input_batch
        return result

    _may_reorder_batch._flashprefill_original = original
    model_runner_class._may_reorder_batch = _may_reorder_batch


def unwatch(model_runner_class: type) -> None:
    """Undo `watch`."""
    global _input_batch
    _input_batch = None
    wrapped = getattr(model_runner_class, "_may_reorder_batch", None)
    if hasattr(wrapped, "_flashprefill_original"):
        model_runner_class._may_reorder_batch = wrapped._flashprefill_original


def prompt_lengths(num_computed_tokens: np.ndarray) -> np.ndarray | None:
    """Tokens known of each request: its prompt, and what it had generated if it is being recomputed.

    Args:
        num_computed_tokens: [num_reqs] integers of the batch that metadata is being built for.

    Returns:
        [num_reqs] int32, or None where the watched batch is not this one (a dummy run, a part of a batch).
    """
    if _input_batch is None:
        return None
    num_reqs = len(num_computed_tokens)
    if _input_batch.num_reqs != num_reqs:
        return None
    if not np.array_equal(_input_batch.num_computed_tokens_cpu[:num_reqs], num_computed_tokens):
        return None
    return np.array(_input_batch.num_tokens_no_spec[:num_reqs])
