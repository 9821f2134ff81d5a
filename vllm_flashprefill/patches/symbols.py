"""What our classes call of vLLM's, looked up before any engine starts."""

from __future__ import annotations

import dataclasses
import inspect

from vllm_flashprefill.backend.attention_impl import KVWrittenBeforeMixin
from vllm_flashprefill.backend.batch import HOST_LENGTHS, batch_class, vllms_class

# Of a batch, in every version.
BATCH_FIELDS = {
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "block_table_tensor",
    "slot_mapping",
}
FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata")
BUILD = ("self", "common_prefix_len", "common_attn_metadata", "fast_build")
CACHE_UPDATE = ("self", "layer", "key", "value", "kv_cache", "slot_mapping")


def check_backend(backend: type) -> None:
    """See that the vLLM classes that one of our backends goes before are called as ours call them.

    Raises:
        AttributeError: something is missing, or takes other arguments.
    """
    impl, builder = backend.flashprefill_impl, backend.flashprefill_builder
    vllms_impl, vllms_builder = vllms_class(impl), vllms_class(builder)
    _check_arguments(vllms_impl, "forward", FORWARD)
    _check_arguments(vllms_builder, "build", BUILD)
    written_before = hasattr(vllms_impl, "do_kv_cache_update")
    if written_before != issubclass(impl, KVWrittenBeforeMixin):
        how = "before" if written_before else "in"
        raise AttributeError(f"{vllms_impl.__name__} has its cache written {how} `forward`")
    if written_before:
        _check_arguments(vllms_impl, "do_kv_cache_update", CACHE_UPDATE)
    fields = {field.name for field in dataclasses.fields(batch_class(builder))}
    missing = sorted(BATCH_FIELDS - fields)
    if missing:
        raise AttributeError(f"CommonAttentionMetadata has no {', '.join(missing)}")
    if not fields.intersection(HOST_LENGTHS):
        raise AttributeError(f"CommonAttentionMetadata has none of {', '.join(HOST_LENGTHS)}")


def _check_arguments(owner: type, name: str, expected: tuple[str, ...]) -> None:
    """The first arguments of a method are the expected ones."""
    found = tuple(inspect.signature(getattr(owner, name)).parameters)
    if found[: len(expected)] != expected:
        raise AttributeError(f"{owner.__name__}.{name} takes {', '.join(found)}, not {', '.join(expected)}")
