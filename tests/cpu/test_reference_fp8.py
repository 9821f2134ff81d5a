"""The reference of products in e4m3: near the exact one, and off by what e4m3 rounds."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.support import brute_force
from tests.support.e4m3 import to_e4m3
from tests.support.plain_cases import SCALE, tensors
from vllm_flashprefill import FlashPrefillConfig, reference
from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.key_values import KeyValues, dequantise
from vllm_flashprefill.plan import plan_step
from vllm_flashprefill.reference import (
    flash_prefill_paged_ref,
    query_block_bounds,
    select_blocks_ref,
    sparse_attention_fp8_ref,
    sparse_attention_ref,
)

K_SCALE, V_SCALE = torch.tensor([0.03, 0.05]), torch.tensor([0.02, 0.01])
SCALES = {"k_scale": K_SCALE, "v_scale": V_SCALE}


def rounded(x, scale=None):
    """What e4m3 holds of it."""
    scale = torch.ones(1) if scale is None else scale
    return dequantise(to_e4m3(x, scale).view(torch.uint8), scale)


def case(num_tokens, seq_len, alpha=0.3, **options):
    """(q, k, v, mask, other arguments of stage 4), keys and values such as e4m3 holds."""
    q, k, v = tensors(num_tokens, seq_len, **options)
    k, v = rounded(k, K_SCALE), rounded(v, V_SCALE)
    context_len = seq_len - num_tokens
    mask = select_blocks_ref(
        q,
        k,
        context_len=context_len,
        prompt_len=seq_len,
        config=FlashPrefillConfig(alpha=alpha),
        softmax_scale=SCALE,
    )
    return q, k, v, mask, dict(context_len=context_len, block_size=128, softmax_scale=SCALE)


@pytest.mark.parametrize("shape", [(1, 1), (129, 129), (900, 900), (700, 1000), (2500, 2500), (128, 2560)], ids=str)
def test_it_errs_as_e4m3_does(shape):
    q, k, v, mask, arguments = case(*shape)
    out = sparse_attention_fp8_ref(q, k, v, mask, **arguments, **SCALES)
    exact = sparse_attention_ref(rounded(q), k, v, mask, **arguments)
    # Half a step is at most 1/16 of a number; below 2**-6, over 2**8, it is 2**-10, of at most 1 in all.
    magnitudes = sparse_attention_ref(rounded(q), k, v.abs(), mask, **arguments)
    small = 2.0**-18 * v.abs().sum(dim=0).repeat_interleave(2, dim=0)
    assert ((out - exact).abs() <= magnitudes / 16 + small + 1e-5).all()
    if shape != (1, 1):
        # Numbers of random size err by 2.65 % in the mean square, and a row's largest not at all.
        assert 0.012 < brute_force.relative_error(out, exact.double()) < 0.0265
    else:
        torch.testing.assert_close(out, exact)
    # Queries of 16 bits are rounded too, each logit by as much.
    whole = sparse_attention_ref(q, k, v, mask, **arguments)
    assert brute_force.relative_error(out, whole.double()) < 0.06


def test_without_the_factor_small_probabilities_are_lost(monkeypatch):
    # One key takes a row's largest logit; 2,000 others have 2**-10 of its probability, and most of the sum.
    q, k, v = torch.zeros(1, 1, 16), torch.zeros(2001, 1, 16), rounded(torch.randn(2001, 1, 16))
    q[..., 0], k[-1, :, 0], softmax_scale = 1.0, 8.0, 10 * math.log(2) / 8
    mask = torch.ones(1, 1, 16, dtype=torch.bool)
    arguments = dict(context_len=2000, block_size=128, softmax_scale=softmax_scale)
    v += 1

    def error():
        out = sparse_attention_fp8_ref(q, k, rounded(v), mask, **arguments)
        return brute_force.relative_error(out, sparse_attention_ref(q, k, rounded(v), mask, **arguments).double())

    assert error() < 1e-5
    monkeypatch.setattr(reference, "P_SCALE", 1.0)
    assert error() > 0.5


def test_it_is_what_a_row_by_row_loop_computes():
    q, k, v, mask, arguments = case(300, 700, seed=3)
    out = sparse_attention_fp8_ref(q, k, v, mask, **arguments, **SCALES)
    codes = [to_e4m3(q, torch.ones(1)), to_e4m3(k, K_SCALE), to_e4m3(v, V_SCALE)]
    q_codes, k_codes, v_codes = (x.float() for x in codes)
    first = arguments["context_len"] // 128
    for row in range(0, 300, 23):
        position = 400 + row
        own = position // 128
        for head in range(4):
            group = head // 2
            kept = [block for block in range(own) if mask[head, own - first, block]]
            largest, total, acc = -math.inf, 0.0, torch.zeros(16)
            for block in (own, *kept):
                tokens = slice(128 * block, min(128 * block + 128, position + 1))
                logits = k_codes[tokens, group] @ q_codes[row, head] * (SCALE * K_SCALE[group])
                before, largest = largest, max(largest, logits.max().item())
                p = (logits - largest).exp()
                total = total * math.exp(before - largest) + p.sum()
                p = (256 * p).to(torch.float8_e4m3fn).float()
                acc = acc * math.exp(before - largest) + p @ v_codes[tokens, group]
            torch.testing.assert_close(out[row, head], acc / total * V_SCALE[group] / 256, rtol=1e-4, atol=1e-5)


def test_queries_beyond_its_range_are_its_ends():
    q, k, v, mask, arguments = case(200, 200)
    far = sparse_attention_fp8_ref(300 * q, k, v, mask, **arguments)
    near = sparse_attention_fp8_ref((300 * q).clamp(-448, 448), k, v, mask, **arguments)
    assert (300 * q).abs().max() > 448 and torch.equal(far, near) and not far.isnan().any()


def test_sinks_take_part_in_the_sum_alone():
    q, k, v, mask, arguments = case(300, 300)
    sinks = torch.linspace(-20, 20, 4)
    out = sparse_attention_fp8_ref(q, k, v, mask, **arguments, **SCALES, sinks=sinks)
    without = sparse_attention_fp8_ref(q, k, v, mask, **arguments, **SCALES)
    lse = torch.empty(300, 4)
    keys = k.repeat_interleave(2, dim=1)
    for index, (start, end) in enumerate(query_block_bounds(0, 300, 128)):
        seen = mask[:, index].repeat_interleave(128, dim=-1)[:, None, :300].expand(-1, end - start, -1).tril(start)
        logits = SCALE * torch.einsum("qhd,khd->hqk", rounded(q)[start:end], keys)
        lse[start:end] = logits.masked_fill(~seen, -math.inf).logsumexp(dim=-1).T
    torch.testing.assert_close(out, without * (lse - sinks).sigmoid()[..., None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("q_scale", [None, 1, 2])
def test_a_paged_cache_on_the_cpu(q_scale):
    generator = torch.Generator().manual_seed(0)
    config = FlashPrefillConfig(alpha=0.5, num_sink_blocks=0, num_window_blocks=1, min_sparse_tokens=0)
    fp8 = dataclasses.replace(config, compute_dtype="fp8")
    plan = plan_step(np.array([0, 500, 520]), np.array([700, 20]), config)
    q, k, v = tensors(520, 720)
    k, v = (to_e4m3(x, scale) for x, scale in ((k, K_SCALE), (v, V_SCALE)))
    pages = torch.randperm(45, generator=generator)
    cache = torch.zeros(2, 45, 16, 2, 16).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, pages] = torch.stack([k, v]).view(torch.uint8).view(2, 45, 16, 2, 16)
    table = torch.stack([pages, pages]).int()
    kv, arguments = KeyValues(*cache, table, **SCALES), dict(softmax_scale=SCALE)
    if q_scale is not None:
        arguments["q_scale"] = torch.arange(1, q_scale + 1) / 64
        q = to_e4m3(q, arguments["q_scale"].repeat_interleave(4 // q_scale))
    out, expected, exact = (torch.full(q.shape, torch.nan) for _ in range(3))
    if q_scale is not None:
        out = out.bfloat16()
    flash_prefill_paged(q, kv, plan, config=fp8, **arguments, out=out)
    flash_prefill_paged_ref(q, kv, plan, config=fp8, **arguments, out=expected)
    flash_prefill_paged_ref(q, kv, plan, config=config, **arguments, out=exact)
    assert [request.index for request in plan.sparse] == [0]
    torch.testing.assert_close(out[:500].float(), expected[:500], rtol=1e-2, atol=1e-3)
    assert out[500:].isnan().all()
    assert 0.005 < brute_force.relative_error(expected[:500], exact[:500].double()) < 0.06
