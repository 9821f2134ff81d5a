import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.plan import SparseRequest, plan_step
from vllm_flashprefill.routing import DenseReason, request_dense_reason

CONFIG = FlashPrefillConfig(min_sparse_tokens=1024)


@pytest.mark.parametrize(
    ("query_len", "context_len", "prompt_len", "reason"),
    [
        (4000, 0, 4000, None),
        (2048, 0, 8000, None),
        (2048, 2048, 8000, None),
        (1, 4000, 4001, DenseReason.DECODE),
        (5, 4000, 4001, DenseReason.DECODE),  # speculative tokens after the last known one
        (1023, 0, 1023, DenseReason.SHORT_PROMPT),
        (1, 0, 1, DenseReason.SHORT_PROMPT),
        (512, 0, 8000, DenseReason.NOTHING_TO_PRUNE),  # sinks and window cover it
        (768, 0, 8000, DenseReason.NOTHING_TO_PRUNE),
        (769, 0, 8000, None),  # the seventh query block's first row
        (100, 3970, 4070, DenseReason.NOTHING_TO_PRUNE),  # all of it is dense tail
        (300, 3770, 4070, None),
    ],
)
def test_route_of_a_request(query_len, context_len, prompt_len, reason):
    assert request_dense_reason(query_len, context_len, prompt_len, CONFIG) == reason


@pytest.mark.parametrize(
    ("query_len", "context_len", "prompt_len", "is_prefilling", "reason"),
    [
        # of unknown length: a decode with drafted tokens, or the end of a prompt
        (5, 4000, None, None, DenseReason.DECODE),
        (128, 4000, None, None, DenseReason.DECODE),
        (129, 4000, None, None, None),
        (5, 4000, None, True, None),
        (1, 4000, None, True, DenseReason.DECODE),
        (4000, 0, None, None, None),
        (100, 0, None, None, DenseReason.SHORT_PROMPT),
        # of known length
        (5, 4000, 4005, None, None),
        (5, 4000, 4005, True, None),
        (5, 4000, 4005, False, DenseReason.DECODE),
        (4000, 0, 4000, False, DenseReason.DECODE),
        (2048, 2048, None, False, DenseReason.DECODE),
    ],
)
def test_route_of_a_request_that_may_decode(query_len, context_len, prompt_len, is_prefilling, reason):
    config = FlashPrefillConfig(min_sparse_tokens=1024, num_dense_tail_blocks=0)
    assert request_dense_reason(query_len, context_len, prompt_len, config, is_prefilling) == reason
    plan = plan_step(
        np.array([0, query_len]),
        np.array([context_len + query_len]),
        config,
        None if prompt_len is None else np.array([prompt_len]),
        None if is_prefilling is None else np.array([is_prefilling]),
    )
    assert plan.dense_tokens == ({} if reason is None else {reason: query_len})
    assert [request.prompt_len for request in plan.sparse] == [context_len + query_len] * (reason is None)


def test_plan_of_a_mixed_step():
    # a decode, a short prompt, a whole long prompt, a later chunk of another
    query_lens, seq_lens, prompt_lens = [1, 100, 3000, 1000], [2000, 100, 3000, 3000], [2000, 100, 3000, 9000]
    plan = plan_step(np.cumsum([0, *query_lens]), np.array(seq_lens), CONFIG, np.array(prompt_lens))
    assert plan.dense.tolist() == [0, 1]
    assert plan.dense_tokens == {DenseReason.DECODE: 1, DenseReason.SHORT_PROMPT: 100}
    whole, chunk = plan.sparse
    assert (whole.index, whole.query_slice, whole.context_len, whole.prompt_len) == (2, slice(101, 3101), 0, 3000)
    assert (chunk.index, chunk.query_slice, chunk.context_len, chunk.prompt_len) == (3, slice(3101, 4101), 2000, 9000)
    assert chunk.seq_len == 3000
    assert plan.num_sparse_tokens == 4000


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 12000)),
        max_size=12,
    ),
    st.booleans(),
)
def test_every_token_is_planned_once(requests, know_prompts):
    query_lens = np.array([query_len for query_len, _, _ in requests], dtype=np.int64)
    seq_lens = query_lens + np.array([context for _, context, _ in requests], dtype=np.int64)
    prompts = np.array([prompt for _, _, prompt in requests], dtype=np.int64) if know_prompts else None
    plan = plan_step(np.concatenate([[0], np.cumsum(query_lens)]), seq_lens, CONFIG, prompts)
    planned = sorted([*plan.dense.tolist(), *(request.index for request in plan.sparse)])
    assert planned == query_lens.nonzero()[0].tolist(), "requests without tokens are padding"
    assert plan.num_sparse_tokens + sum(plan.dense_tokens.values()) == query_lens.sum()
    for request in plan.sparse:
        assert request.query_len > 0
        assert request.prompt_len >= max(request.seq_len, CONFIG.min_sparse_tokens)


@pytest.mark.parametrize(
    "query_lens, context_lens, heads, dense",
    [
        # As measured on an H200 (docs/performance.md): 1,024 new tokens are too few over 32K, 512 not over 116K.
        ([512], [32 << 10], 32, True),
        ([512], [64 << 10], 32, True),
        ([512], [116 << 10], 32, False),
        ([1024], [32 << 10], 32, True),
        ([2048], [32 << 10], 32, False),
        # A rank of four has a quarter of the work and as many launches.
        ([1024], [116 << 10], 8, True),
        ([8192], [32 << 10], 8, False),
        # The whole step counts.
        ([512] * 3, [32 << 10] * 3, 32, False),
        # It is of appends alone, on a GPU.
        ([4096], [0], 1, False),
        ([512], [32 << 10], None, False),
    ],
)
def test_a_step_of_short_appends_is_dense(query_lens, context_lens, heads, dense):
    seq_lens = np.add(query_lens, context_lens)
    config = FlashPrefillConfig()
    for options, is_dense in ((config, dense), (dataclasses.replace(config, min_append_tokens=0), False)):
        plan = plan_step(np.cumsum([0, *query_lens]), seq_lens, options, seq_lens, append_heads=heads)
        assert plan.dense_tokens == ({DenseReason.SHORT_APPEND: sum(query_lens)} if is_dense else {})
        assert len(plan.sparse) == (0 if is_dense else len(query_lens))
        assert plan.dense.tolist() == (list(range(len(query_lens))) if is_dense else [])


@pytest.mark.parametrize("heads, chunk, prompt", [(8, 2048, 32 << 10), (4, 2048, 128 << 10), (32, 512, 32 << 10)])
def test_a_long_prompt_is_sparse_however_small_its_chunks(heads, chunk, prompt):
    sparse = 0
    for start in range(chunk, prompt, chunk):
        plan = plan_step(
            np.array([0, chunk]),
            np.array([start + chunk]),
            FlashPrefillConfig(),
            np.array([prompt]),
            append_heads=heads,
        )
        sparse += plan.num_sparse_tokens
        ends = start + chunk == prompt
        assert set(plan.dense_tokens) <= {DenseReason.NOTHING_TO_PRUNE, *([DenseReason.SHORT_APPEND] if ends else [])}
    assert sparse >= prompt - 3 * chunk


def test_short_appends_beside_a_chunk_of_a_long_prompt_are_sparse():
    seq_lens, prompt_lens = np.array([32_768, 16_384]), np.array([32_768, 60_000])
    plan = plan_step(np.array([0, 512, 1024]), seq_lens, FlashPrefillConfig(), prompt_lens, append_heads=4)
    assert [request.index for request in plan.sparse] == [0, 1]


def test_short_appends_beside_a_whole_prompt_are_sparse():
    query_lens, seq_lens = np.array([512, 1, 5000]), np.array([32_768, 600, 5000])
    plan = plan_step(np.cumsum([0, *query_lens]), seq_lens, FlashPrefillConfig(), seq_lens, append_heads=4)
    assert [request.index for request in plan.sparse] == [0, 2]
    assert plan.dense_tokens == {DenseReason.DECODE: 1}


def plan_one_by_one(query_lens, context_lens, prompt_lens, is_prefilling, config):
    """(sparse requests, dense rows, dense tokens) by the rule for one request."""
    sparse, dense, dense_tokens, start = [], [], Counter(), 0
    for row, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        known = None if prompt_lens is None else prompt_lens[row]
        reason = request_dense_reason(
            query_len, context_len, known, config, None if is_prefilling is None else is_prefilling[row]
        )
        if query_len and reason is None:
            prompt_len = max(known or 0, context_len + query_len)
            sparse.append(SparseRequest(row, start, query_len, context_len, prompt_len))
        elif query_len:
            dense.append(row)
            dense_tokens[reason] += query_len
        start += query_len
    return tuple(sparse), dense, dict(dense_tokens)


# Where the rule changes for one of CONFIGS, and one more or less.
edges = st.one_of(st.sampled_from([0, 1, 2, 127, 128, 129, 768, 769, 1023, 1024, 1025]), st.integers(0, 5000))
some_requests = st.tuples(edges, edges, st.one_of(edges, st.integers(-3, 3)), st.booleans())
decodes = st.tuples(st.just(1), st.integers(1, 5000), st.just(0), st.just(False))
CONFIGS = [
    CONFIG,
    FlashPrefillConfig(min_sparse_tokens=0, num_dense_tail_blocks=0),
    FlashPrefillConfig(min_sparse_tokens=200, num_sink_blocks=0, num_window_blocks=1, num_dense_tail_blocks=4),
]


@given(
    st.one_of(
        st.lists(some_requests, max_size=12),
        st.lists(decodes, max_size=12),
        st.lists(st.one_of(decodes, some_requests), max_size=40),
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from(CONFIGS),
    st.sampled_from([np.int32, np.int64]),
    st.integers(0, 3),
)
@settings(max_examples=1000, deadline=None)
def test_a_batch_is_planned_as_its_requests_are_one_by_one(requests, know_prompts, know_which, config, dtype, first):
    query_lens, context_lens, _, prefill = ([request[n] for request in requests] for n in range(4))
    prompt_lens = [max(0, q + c + rest) for q, c, rest, _ in requests] if know_prompts else None
    is_prefilling = prefill if know_which else None
    expected = plan_one_by_one(query_lens, context_lens, prompt_lens, is_prefilling, config)
    plan = plan_step(
        # A micro-batch's queries need not begin at 0.
        np.cumsum([first, *query_lens]).astype(dtype),
        np.add(query_lens, context_lens).astype(dtype),
        config,
        None if prompt_lens is None else np.array(prompt_lens, dtype=np.int32),
        None if is_prefilling is None else np.array(is_prefilling, dtype=bool),
    )
    sparse = tuple(dataclasses.replace(request, query_start=request.query_start - first) for request in plan.sparse)
    assert (sparse, plan.dense.tolist(), plan.dense_tokens) == expected
    assert plan.dense.dtype == np.int64
    assert all(type(tokens) is int for tokens in plan.dense_tokens.values())
    assert all(type(value) is int for request in plan.sparse for value in dataclasses.astuple(request))


@given(st.integers(1, 60), st.integers(1, 8000))
def test_a_chunk_is_never_sparse_where_its_whole_prompt_is_dense(num_chunk_blocks, prompt_len):
    chunk = 128 * num_chunk_blocks
    whole = request_dense_reason(prompt_len, 0, prompt_len, CONFIG)
    for context in range(0, prompt_len, chunk):
        part = request_dense_reason(min(chunk, prompt_len - context), context, prompt_len, CONFIG)
        assert whole is None or part is not None


@pytest.mark.parametrize(
    ("query_start_loc", "seq_lens"),
    [([0, 4, 2], [4, 4]), ([0, 4], [4, 4]), ([0, 10], [5])],
)
def test_arrays_that_are_no_batch(query_start_loc, seq_lens):
    with pytest.raises(ValueError, match="query_start_loc"):
        plan_step(np.array(query_start_loc), np.array(seq_lens), CONFIG)


@pytest.mark.parametrize("context, query", [(0, 1), (0, 128), (0, 129), (127, 1), (127, 2), (1000, 300), (256, 1024)])
def test_blocks_that_a_chunk_sees(context, query):
    request = SparseRequest(0, 0, query, context, context + query)
    assert request.visible_blocks == sum(block + 1 for block in request.query_blocks)
