"""What vLLM does is what our classes take it to do: seen before any request, by one tiny batch.

What vLLM writes into its cache is read back, and the batch (a decode, a chunk and a whole prompt) goes through its own
attention and through ours, which keeps every block. Layers for which that is not the same are dense.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_flashprefill.backend.batch import batch_class
from vllm_flashprefill.backend.device_counts import NoCounts
from vllm_flashprefill.backend.layer_routing import has_e4m3_cache
from vllm_flashprefill.config import BLOCK_SIZE, FlashPrefillConfig, strict
from vllm_flashprefill.key_values import dequantise

logger = logging.getLogger("vllm.flashprefill")

# Releases whose GPU engines were compared with vLLM's own backend, request by request (tests/gpu), before this check
# was there; it has not run in them. Caches were in 16 bits, and no layer had sinks.
COMPARED_ON_GPU = ("0.10.0", "0.12.0", "0.24.0")

# What was checked in this process, and what is wrong with it, or None.
_results: dict[tuple, str | None] = {}


def compared_on_gpu() -> bool:
    """Whether the installed vLLM is one of `COMPARED_ON_GPU`."""
    from vllm import __version__

    return __version__.partition("+")[0] in COMPARED_ON_GPU


class Failed(Exception):
    """What is not as expected, in words."""


def check_layers(builder: Any, layers: Iterable[Any]) -> None:
    """Check each kind of layer that a builder serves, once in a process; those that fail are dense, and it is said.

    Args:
        builder: one of ours, whose vLLM class is ready.
        layers: those of its `own_layers` that are to be checked.

    Raises:
        RuntimeError: one failed and ``FLASHPREFILL_STRICT=1``.
    """
    if not type(builder).__module__.startswith(__package__.partition(".")[0]):
        # One that vLLM has made around ours, for layers whose batches are others.
        return
    for layer in layers:
        impl = layer.impl
        if impl.never_sparse():
            continue
        config, page_size = builder.flashprefill_config, _page_size(builder)
        dtypes = _dtype(builder), has_e4m3_cache(impl), getattr(impl, "sinks", None) is not None
        kind = (type(impl), impl.num_heads, impl.num_kv_heads, impl.head_size, page_size, dtypes, config)
        if kind not in _results:
            _results[kind] = _failure(builder, layer)
            if _results[kind] is not None:
                said = (
                    f"FlashPrefill: layers with {impl.num_heads}/{impl.num_kv_heads} heads of {impl.head_size} stay "
                    f"dense, since this vLLM is not as expected: {_results[kind]}"
                )
                if strict():
                    raise RuntimeError(said)
                logger.error("%s", said)
        impl.self_check_failed |= _results[kind] is not None


def _failure(builder: Any, layer: Any) -> str | None:
    try:
        with torch.inference_mode():
            _check(builder, layer)
    except Failed as failed:
        return str(failed)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check(builder: Any, layer: Any) -> None:
    impl, device = layer.impl, torch.device(builder.device)
    scheduler, model = builder.vllm_config.scheduler_config, builder.vllm_config.model_config
    config = _all_kept(builder.flashprefill_config)
    # A layer's own, where vLLM leaves its cache in 16 bits.
    config = dataclasses.replace(config, compute_dtype=impl.flashprefill_config.compute_dtype)
    if _num_queries(config) > min(scheduler.max_num_batched_tokens, model.max_model_len):
        config = dataclasses.replace(config, num_sink_blocks=0, num_window_blocks=1)
    batch = _Batch(config, _page_size(builder), device)
    if batch.num_queries > scheduler.max_num_batched_tokens or max(batch.seq_lens) > model.max_model_len:
        # This engine never has a step with anything to prune.
        return
    with _of_no_request(builder, impl, config, device):
        common = batch.common(batch_class(type(builder)))
        if not builder.can_plan(common):
            return
        metadata = builder.build(0, common)
        step = getattr(metadata, "flashprefill", None)
        if step is None or [request.index for request in step.plan.sparse] != [1, 2]:
            raise Failed("its batches cannot be planned")

        generator = torch.Generator(device).manual_seed(0)

        def random(rows: int, heads: int) -> torch.Tensor:
            shape = rows, heads, impl.head_size
            return torch.randn(shape, generator=generator, device=device).to(_dtype(builder))

        keys, values = (random(len(batch.slots), impl.num_kv_heads) for _ in range(2))
        query = random(batch.num_queries, impl.num_heads)
        new_keys, new_values = keys[batch.is_new], values[batch.is_new]
        dtype = torch.uint8 if has_e4m3_cache(impl) else _dtype(builder)
        where = batch.num_pages, batch.page_size, impl.num_kv_heads, impl.head_size, dtype, device
        if has_e4m3_cache(impl):
            # What e4m3 holds of them at these scales.
            keys, values = (x.clamp(-448 * s.view(-1, 1), 448 * s.view(-1, 1)) for x, s in zip(
                (keys, values), (layer._k_scale, layer._v_scale), strict=True))  # fmt: skip
            query = _as_handed(layer, query)
        cache = builder.new_cache(*where).zero_()
        if impl.dense_reason(layer, cache, metadata) is not None:
            return
        _write(impl, layer, keys, values, cache, metadata, batch.slots)
        _read_back(impl, layer, cache, batch.slots, keys, values)

        expected, cache_of_vllm = torch.zeros_like(query, dtype=_dtype(builder)), cache.clone()
        for view in impl.paged_kv(cache_of_vllm):
            view[batch.new_slots // batch.page_size, batch.new_slots % batch.page_size] = 0
        if hasattr(impl, "do_kv_cache_update"):
            impl.do_kv_cache_update(layer, new_keys, new_values, cache_of_vllm, batch.new_slots)
        given = new_keys, new_values, cache_of_vllm
        impl.vllm_forward(layer, query, *given, metadata, expected)
        _read_back(impl, layer, cache_of_vllm, batch.slots, keys, values)
        found = torch.zeros_like(expected)
        impl.forward_sparse(layer, query, new_keys, new_values, cache, metadata, found)

    # Both round to the dtype, at most a few times; vLLM's rounds probabilities to e4m3 where the cache is.
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    tolerance = max(1e-3, 4 * torch.finfo(found.dtype).eps) if not has_e4m3_cache(impl) else 0.1
    if not error <= tolerance:
        raise Failed(f"attention that keeps every block differs from vLLM's own by {error:.2g}, relative")


class _Batch:
    """A decode, a chunk and a whole prompt, each of whose pages lie in an order of their own.

    Attributes:
        slots: [tokens so far of all requests] int64.
        is_new: which of those are this step's.
    """

    def __init__(self, config: FlashPrefillConfig, page_size: int, device: torch.device) -> None:
        self.page_size, self.device = page_size, device
        prompt = _prompt_len(config)
        self.query_lens, self.seq_lens = [1, CHUNK, prompt], [41, prompt + 30, prompt]
        self.num_queries = sum(self.query_lens)
        counts = [-(-length // page_size) for length in self.seq_lens]
        # One page is nobody's.
        self.num_pages = sum(counts) + 1
        order = iter(range(self.num_pages - 1, 0, -1))
        pages = [list(itertools.islice(order, count)) for count in counts]
        rows = [row + [0] * (max(counts) - len(row)) for row in pages]
        self.block_table = torch.tensor(rows, dtype=torch.int32, device=device)
        slots, is_new = [], []
        for row, (query_len, seq_len) in enumerate(zip(self.query_lens, self.seq_lens, strict=True)):
            position = torch.arange(seq_len)
            slots.append(torch.tensor(pages[row])[position // page_size] * page_size + position % page_size)
            is_new.append(position >= seq_len - query_len)
        self.slots, self.is_new = torch.cat(slots).to(device), torch.cat(is_new).to(device)
        self.new_slots = self.slots[self.is_new]

    def common(self, batch_class: type) -> Any:
        """As vLLM's model runner describes it, in as many words as this vLLM has."""
        starts = torch.tensor([0, *itertools.accumulate(self.query_lens)], dtype=torch.int32)
        lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        values = dict(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lens.to(self.device),
            seq_lens_cpu=lens,
            _seq_lens_cpu=lens,
            seq_lens_cpu_upper_bound=lens,
            num_computed_tokens_cpu=lens - starts.diff(),
            _num_computed_tokens_cpu=lens - starts.diff(),
            num_reqs=len(lens),
            num_actual_tokens=self.num_queries,
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens),
            block_table_tensor=self.block_table,
            slot_mapping=self.new_slots,
            causal=True,
            is_prefilling=torch.tensor([False, True, True]),
        )
        known = {field.name for field in dataclasses.fields(batch_class)}
        return batch_class(**{name: value for name, value in values.items() if name in known})


# Tokens of the chunk: where vLLM does not say what a request is, up to a block after others is taken for a decode.
CHUNK = BLOCK_SIZE + 20


def _prompt_len(config: FlashPrefillConfig) -> int:
    """The shortest in which a block may be left out, and some tokens more."""
    return BLOCK_SIZE * (config.num_sink_blocks + config.num_window_blocks) + 70


def _num_queries(config: FlashPrefillConfig) -> int:
    return 1 + CHUNK + _prompt_len(config)


def _all_kept(config: FlashPrefillConfig) -> FlashPrefillConfig:
    none = dict.fromkeys(("min_sparse_tokens", "min_append_tokens", "num_dense_tail_blocks", "num_dense_layers"), 0)
    return dataclasses.replace(config, alpha=0.0, **none)


def _page_size(builder: Any) -> int:
    return builder.block_size


def _dtype(builder: Any) -> torch.dtype:
    return builder.vllm_config.model_config.dtype


@contextlib.contextmanager
def _of_no_request(builder: Any, impl: Any, config: FlashPrefillConfig, device: torch.device) -> Iterator[None]:
    """Builder and impl with another config, and what the layer does is not counted."""
    kept = builder.flashprefill_config, impl.flashprefill_config, impl._counts
    builder.flashprefill_config = impl.flashprefill_config = config
    impl._counts = NoCounts(device)
    try:
        yield
    finally:
        builder.flashprefill_config, impl.flashprefill_config, impl._counts = kept


def _write(impl: Any, layer: Any, keys: Any, values: Any, cache: Any, metadata: Any, slots: torch.Tensor) -> None:
    """Into those slots, as vLLM does."""
    if hasattr(impl, "do_kv_cache_update"):
        impl.do_kv_cache_update(layer, keys, values, cache, slots)
    else:
        whole = copy.copy(metadata)
        whole.slot_mapping = slots
        impl.write_kv(layer, keys, values, cache, whole)


def _read_back(impl: Any, layer: Any, cache: Any, slots: torch.Tensor, keys: Any, values: Any) -> None:
    kv = impl.key_values(layer, cache, None)
    for view, scale, x in zip(kv.codes(), (kv.k_scale, kv.v_scale), (keys, values), strict=True):
        page_size = view.shape[1]
        held = view[slots // page_size, slots % page_size]
        if kv.fp8:
            # Half a step of e4m3, which has three bits after the first, and none below 2**-9.
            tolerance = x.float().abs() / 14 + 2**-9 * scale.reshape(-1, 1)
            equal = ((dequantise(held, scale) - x.float()).abs() <= tolerance).all()
        else:
            equal = torch.equal(held, x)
        if not equal:
            raise Failed("what is written into its cache is not what is read from it")


def _as_handed(layer: Any, query: torch.Tensor) -> torch.Tensor:
    """[tokens, H, D], as vLLM's layer hands them to its impl."""
    if (quantise := getattr(layer, "query_quant", None)) is None:
        return query
    return quantise(query.flatten(1), layer._q_scale)[0].view(query.shape)
