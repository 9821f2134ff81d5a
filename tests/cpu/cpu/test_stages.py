"""Batched stages of the CPU against the reference."""

import dataclasses
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.plain_cases import SCALE, request_strategy, tensors
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.cpu import block_select, sparse_attention
from vllm_flashprefill.cpu.block_select import block_select_cpu
from vllm_flashprefill.cpu.sparse_attention import sparse_attention_cpu
from vllm_flashprefill.reference import (
    select_blocks_ref,
    sparse_attention_ref,
)


@settings(max_examples=100, deadline=None)
@given(
    request_strategy,
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    st.integers(0, 2**31),
)
def test_batched_cpu_attention_equals_the_reference(request_shape, alpha, heads, seed):
    query_len, context_len, rest = request_shape
    seq_len = query_len + context_len
    q, k, v = tensors(query_len, seq_len, heads=heads[0], kv_heads=heads[1], seed=seed)
    config = FlashPrefillConfig(alpha=alpha)
    mask = select_blocks_ref(
        q, k, context_len=context_len, prompt_len=seq_len + rest, config=config, softmax_scale=SCALE
    )
    arguments = dict(context_len=context_len, block_size=128, softmax_scale=SCALE)
    for sinks in (None, torch.linspace(-20, 20, q.shape[1])):
        out = sparse_attention_cpu(q, k, v, mask, **arguments, sinks=sinks)
        expected = sparse_attention_ref(q, k, v, mask, **arguments, sinks=sinks)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_batched_cpu_attention_gathers_in_pieces(monkeypatch):
    q, k, v = tensors(1500, 1500)
    config = FlashPrefillConfig(alpha=0.5)
    mask = select_blocks_ref(q, k, context_len=0, prompt_len=1500, config=config, softmax_scale=SCALE)
    arguments = dict(context_len=0, block_size=128, softmax_scale=SCALE)
    whole = sparse_attention_cpu(q, k, v, mask, **arguments)
    monkeypatch.setattr(sparse_attention, "GATHER_BYTES", 1)
    torch.testing.assert_close(sparse_attention_cpu(q, k, v, mask, **arguments), whole)


@settings(max_examples=100, deadline=None)
@given(
    request_strategy,
    st.sampled_from([0.0, 0.3, 0.8]),
    st.sampled_from(
        [
            {"piece_size": 0},
            {},
            {"candidate_alpha": 0.3},
            {"piece_size": 64, "candidate_alpha": 0.1},
            {"piece_size": 4},
            {"piece_size": 32, "candidate_alpha": 0.3},
        ]
    ),
    st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    st.sampled_from([1, 2 << 20]),
    st.integers(0, 2**31),
)
def test_batched_cpu_selection_equals_the_reference(request_shape, alpha, options, heads, logit_bytes, seed):
    query_len, context_len, rest = request_shape
    seq_len = query_len + context_len
    q, k, _ = tensors(query_len, seq_len, heads=heads[0], kv_heads=heads[1], seed=seed)
    config = FlashPrefillConfig(alpha=alpha, num_sink_blocks=1, num_window_blocks=1, **options)
    arguments = dict(prompt_len=seq_len + rest, softmax_scale=SCALE)
    with mock.patch.object(block_select, "LOGIT_BYTES", logit_bytes):
        mask = block_select_cpu(q, k, config=config, **arguments)
    # Sums are in another order, so that what is within rounding of a threshold may be on either side of it.
    least, *candidates = (
        select_blocks_ref(q, k, context_len=context_len, config=near, **arguments)
        for near in (scaled(config, "alpha", 1 + 1e-4), *near_candidates(config))
    )
    most = select_blocks_ref(q, k, context_len=context_len, config=scaled(config, "alpha", 1 - 1e-4), **arguments)
    undecided = candidates[0] != candidates[1]
    assert ((least <= mask) | undecided).all() and ((mask <= most) | undecided).all()


def near_candidates(config):
    return [scaled(config, "candidate_alpha", factor) for factor in (1 - 1e-4, 1 + 1e-4)]


def scaled(config, name, factor):
    return dataclasses.replace(config, **{name: min(1.0, getattr(config, name) * factor)})
