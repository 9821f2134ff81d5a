"""Small batches for the FlashAttention classes of the installed vLLM and ours, on CPU tensors."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from packaging.version import Version

from tests.support.attention import exact_attention
from tests.support.engines import vllm_version
from tests.support.request import Request, structured
from tests.support.vllm_side import (
    Shape,
    Side,
    common_fields,
    common_metadata,
    common_values,
    counted,
    heads_before_tokens,
    our_backend,
)
from vllm_flashprefill import counters
from vllm_flashprefill.backend import prompt_lengths
from vllm_flashprefill.config import FlashPrefillConfig

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
SCALE = HEAD_SIZE**-0.5
DTYPE = torch.bfloat16
BARE = {
    "num_sink_blocks": 0, "num_window_blocks": 1, "num_dense_tail_blocks": 0, "min_sparse_tokens": 300,
    "min_append_tokens": 0,
}  # fmt: skip
EXACT = FlashPrefillConfig(alpha=0.0, **BARE)
SPARSE = FlashPrefillConfig(alpha=0.4, **{**BARE, "num_dense_tail_blocks": 1})


def new_cache(num_pages, page_size, heads_first=False):
    """A cache laid out as vLLM's, and its [2, num_pages, page_size, G, D] view."""
    if heads_before_tokens():
        cache = torch.full((num_pages, KV_HEADS, page_size, 2 * HEAD_SIZE), torch.nan, dtype=DTYPE)
        if not heads_first:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        return cache, cache.transpose(1, 2).unflatten(-1, (2, HEAD_SIZE)).movedim(-2, 0)
    shape = our_backend().get_kv_cache_shape(num_pages, page_size, KV_HEADS, HEAD_SIZE)
    cache = torch.full(shape, torch.nan, dtype=DTYPE)
    if heads_first:
        cache = cache.transpose(2, 3).contiguous().transpose(2, 3)
    # Which dimension is of keys and values.
    return cache, cache.movedim(shape.index(2), 0)


@dataclass
class Step:
    """A batch as vLLM's model runner gives it to builder and impl.

    Attributes:
        padding: rows after the batch's own.
        group: which of the groups of layers this is, whose caches have pages in another order.
        in_a_graph: whether the batch is padded as those of full CUDA graphs, with that many requests without tokens.
    """

    requests: list
    page_size: int
    padding: int
    heads_first: bool = False
    group: int = 0
    in_a_graph: bool = False

    def __post_init__(self):
        self.parts = [
            structured(
                r.query_len, r.seq_len, heads=HEADS, kv_heads=KV_HEADS, dim=HEAD_SIZE, dtype=DTYPE, device="cpu",
                seed=1000 * r.seed + r.seq_len,
            )
            for r in self.requests
        ]  # fmt: skip
        query_lens = [request.query_len for request in self.requests]
        self.num_tokens = sum(query_lens)
        self.starts = np.cumsum([0, *query_lens])
        counts = [-(-request.seq_len // self.page_size) for request in self.requests]
        generator = torch.Generator().manual_seed(100 * self.group + len(counts))
        order = torch.randperm(sum(counts) + 2, generator=generator)
        self.block_table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        self.kv_cache, self.keys_and_values = new_cache(len(order), self.page_size, self.heads_first)
        slots = []
        used = 0
        for row, (request, count) in enumerate(zip(self.requests, counts, strict=True)):
            self.block_table[row, :count] = order[used : used + count]
            positions = torch.arange(request.seq_len)
            slot = self.block_table[row, positions // self.page_size].long() * self.page_size
            slot += positions % self.page_size
            context = request.context_len
            for cache, x in zip(self.keys_and_values, self.parts[row][1:], strict=True):
                cache[slot[:context] // self.page_size, slot[:context] % self.page_size] = x[:context]
            slots.append(slot[context:])
            used += count
        self.slot_mapping = torch.cat(slots)

    def inputs(self):
        """query, key, value with rows of padding, and an output full of NaN."""
        q = torch.cat([part[0] for part in self.parts])
        k, v = (torch.cat([part[n][-r.query_len :] for part, r in self.with_requests()]) for n in (1, 2))
        padded = [torch.cat([x, x.new_full((self.padding, *x.shape[1:]), torch.nan)]) for x in (q, k, v)]
        return *padded, torch.full_like(padded[0], torch.nan)

    def with_requests(self):
        return list(zip(self.parts, self.requests, strict=True))

    def common(self, **changes):
        seq_lens = np.array([r.seq_len for r in self.requests])
        known_lens = np.array([r.prompt_len for r in self.requests])
        values = common_values(self.starts, seq_lens, seq_lens, known_lens, self.block_table, self.slot_mapping)
        for name in ("seq_lens_cpu", "num_computed_tokens_cpu"):
            values[f"_{name}"] = values[name]
        if self.in_a_graph:
            values |= self._padded(values)
        return common_metadata(values | changes)

    def _padded(self, values):
        def pad(x, value=0):
            return torch.cat([x, x.new_full((self.padding, *x.shape[1:]), value)])

        by_request = {k for k, v in values.items() if torch.is_tensor(v) and len(v) == len(self.requests)}
        return {
            **{name: pad(values[name]) for name in by_request},
            "query_start_loc": pad(values["query_start_loc"], self.num_tokens),
            "query_start_loc_cpu": pad(values["query_start_loc_cpu"], self.num_tokens),
            "slot_mapping": pad(values["slot_mapping"], -1),
            "num_reqs": len(self.requests) + self.padding,
            "num_actual_tokens": self.num_tokens + self.padding,
        }

    def pieces(self, out):
        return list(out[: self.num_tokens].split([r.query_len for r in self.requests]))


class Classes(Side):
    """Ours, made as vLLM makes them. changes: of the impl's arguments."""

    def __init__(self, config, page_size=16, builder_class=None, **changes):
        backend = our_backend()
        shape = Shape(HEADS, KV_HEADS, HEAD_SIZE, DTYPE, page_size)
        own_builder = backend.__bases__[-1].get_builder_cls()
        super().__init__(backend, own_builder, shape, torch.device("cpu"), True, builder_class, **changes)
        self.set_config(config)
        self.impl.vllm_flash_attn_version = 2

    def build(self, step, common_prefix_len=0, drafted=0, **changes):
        """The step's metadata, where the model runner knows how long the prompts are.

        Args:
            drafted: tokens of each request that were drafted before and not accepted, which the runner does not know.
        """
        computed = np.array([r.context_len for r in step.requests]) + drafted
        scheduled, known = (np.array([getattr(r, name) for r in step.requests]) for name in ("query_len", "prompt_len"))
        with mock.patch.object(prompt_lengths, "_watched", (computed, scheduled, known)):
            return self.builder.build(common_prefix_len, step.common(**changes))

    def forward(self, step, metadata, inputs=None, **scales):
        """What vLLM's attention layer does; 0.24.0's writes the cache first."""
        query, key, value, output = inputs or step.inputs()
        if metadata is not None and hasattr(self.impl, "do_kv_cache_update"):
            self.impl.do_kv_cache_update(self.layer, key, value, step.kv_cache, metadata.slot_mapping)
        returned = self.impl.forward(self.layer, query, key, value, step.kv_cache, metadata, output=output, **scales)
        assert returned is output
        return output

    def dense_reason(self, kv_cache):
        return self.impl.dense_reason(self.layer, kv_cache, None)

    def run(self, step):
        return self.forward(step, self.build(step))


def assert_dense(step, out):
    for (q, k, v), got in zip(step.parts, step.pieces(out), strict=True):
        torch.testing.assert_close(got, exact_attention(q, k, v, SCALE).to(DTYPE), rtol=2e-2, atol=1e-2)
    assert out[step.num_tokens :].isnan().all(), "padding is left alone"


def assert_not_planned(classes, step, metadata, calls):
    """The batch is dense, vLLM's own, and counted."""
    calls.clear()
    with counted() as count:
        out = classes.forward(step, metadata)
    assert [call["attn_metadata"] for call in calls] == [metadata]
    assert count.stats == counters.Stats(dense_tokens={"not_planned": step.num_tokens})
    return out


seeds = st.integers(0, 50)
decodes = st.builds(Request, st.just(1), st.integers(1, 700), seed=seeds)
shorts = st.builds(Request, st.integers(1, 299), seed=seeds)
wholes = st.builds(Request, st.integers(300, 700), seed=seeds)
chunks = st.builds(Request, st.integers(1, 500), st.integers(1, 600), st.integers(1, 500), seed=seeds)
steps = st.builds(
    Step,
    st.lists(st.one_of(decodes, shorts, wholes, chunks), min_size=1, max_size=5),
    page_size=st.sampled_from([16, 48, 128]),
    padding=st.integers(0, 3),
    heads_first=st.booleans(),
)
modest = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

since_0_24 = pytest.mark.skipif(Version(vllm_version()) < Version("0.24"), reason="vLLM 0.24.0 has it")


def needs(*fields):
    """For tests of what only newer versions say of a batch."""
    missing = [field for field in fields if field not in common_fields()]
    return pytest.mark.skipif(bool(missing), reason=f"vLLM {vllm_version()} has no {', '.join(missing)}")
