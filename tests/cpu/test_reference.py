import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import brute_force
from tests.support.plain_cases import SCALE, request_strategy, tensors
from tests.support.request import paged
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.api import flash_prefill_varlen
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import plan_step
from vllm_flashprefill.reference import (
    block_mean_ref,
    block_score_ref,
    block_select_ref,
    block_share_ref,
    flash_prefill_paged_ref,
    flash_prefill_ref,
    select_blocks_ref,
)

LENGTHS = [1, 127, 128, 129, 255, 256, 257, 1000, 1024, 1500]


def block_mask_to_tokens(mask, context_len, num_tokens):
    rows = (torch.arange(context_len, context_len + num_tokens) // 128) - context_len // 128
    seq_len = context_len + num_tokens
    return mask[:, rows].repeat_interleave(128, dim=-1)[:, :, :seq_len]


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("context_len", [0, 1, 128, 200])
def test_alpha_0_is_dense(seq_len, context_len):
    if context_len >= seq_len:
        context_len = 0
    q, k, v = tensors(seq_len - context_len, seq_len)
    out = flash_prefill_ref(q, k, v, config=FlashPrefillConfig(alpha=0.0), softmax_scale=SCALE)
    exact = brute_force.dense(q, k, v, softmax_scale=SCALE)
    assert brute_force.relative_error(out, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_plain_pytorch(dtype):
    q, k, v = tensors(900, 900, dtype=dtype)
    out = flash_prefill_ref(q, k, v, config=FlashPrefillConfig(alpha=0.0), softmax_scale=SCALE)
    exact = brute_force.dense(q, k, v, softmax_scale=SCALE)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(2, dim=1).transpose(0, 1),
        v.repeat_interleave(2, dim=1).transpose(0, 1),
        is_causal=True,
        scale=SCALE,
    ).transpose(0, 1)
    assert brute_force.relative_error(out, exact) <= 2 * brute_force.relative_error(plain, exact)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_sparse_is_exact_attention_over_the_kept_tokens(alpha):
    config = FlashPrefillConfig(alpha=alpha)
    q, k, v = tensors(1300, 1700)
    mask = select_blocks_ref(q, k, context_len=400, prompt_len=1700, config=config, softmax_scale=SCALE)
    visible = torch.ones(11, 14, dtype=torch.bool).tril(3)
    assert mask.sum() < 4 * visible.sum(), "the case must prune something"
    out = flash_prefill_ref(q, k, v, config=config, softmax_scale=SCALE)
    exact = brute_force.masked(q, k, v, token_mask=block_mask_to_tokens(mask, 400, 1300), softmax_scale=SCALE)
    assert brute_force.relative_error(out, exact) < 1e-5


def test_mean_of_a_partial_block_divides_by_its_length():
    _, k, _ = tensors(1, 300)
    means = block_mean_ref(k, 128)
    torch.testing.assert_close(means[0], k[:128].mean(dim=0))
    torch.testing.assert_close(means[2], k[256:].mean(dim=0))


def test_score_counts_only_rows_that_see_the_whole_block():
    q, k, _ = tensors(300, 300)
    score = block_score_ref(q, block_mean_ref(k, 128), context_len=0, block_size=128, softmax_scale=SCALE)
    mean = k[128:256, 0].double().mean(dim=0)
    other = k[:128, 0].double().mean(dim=0)
    # Query block 1 of head 0: every row scores block 0, the last row alone scores block 1.
    rows = SCALE * q[128:256, 0].double() @ other
    last = SCALE * q[255, 0].double() @ mean
    largest = max(rows.max(), last)
    torch.testing.assert_close(score[0, 1, 0].double(), (rows - largest).exp().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(score[0, 1, 1].double(), (last - largest).exp(), rtol=1e-5, atol=0)
    assert score[0, 1, 2] == 0
    assert (score[:, 0, 1:] == 0).all()


def test_score_survives_logits_no_exponential_can_hold():
    q, k, _ = tensors(700, 700)
    score = block_score_ref(100 * q, block_mean_ref(k, 128), context_len=0, block_size=128, softmax_scale=1.0)
    assert torch.isfinite(score).all()
    assert (score.amax(dim=-1) >= 1).all()


@pytest.mark.parametrize("context_len", [0, 300, 384])
def test_share_is_the_mean_of_the_rows_own_softmax(context_len):
    q, k, _ = tensors(200, context_len + 200, heads=2, kv_heads=1)
    k_mean = block_mean_ref(k, 128)
    share = block_share_ref(q, k_mean, context_len=context_len, block_size=128, softmax_scale=SCALE)
    first = context_len // 128
    assert share.shape == (2, -(-(context_len + 200) // 128) - first, len(k_mean))
    for index in range(share.shape[1]):
        own = first + index
        assert (share[:, index, own:] == 0).all()
        for head, j in itertools.product(range(2), range(own)):
            shares = []
            for position in range(max(context_len, own * 128), min(context_len + 200, (own + 1) * 128)):
                mass = (SCALE * (k_mean[:own, 0].double() @ q[position - context_len, head].double())).exp()
                shares.append(float(mass[j] / mass.sum()))
            assert share[head, index, j].item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_a_row_of_large_logits_has_no_more_say_in_the_share():
    q, k, _ = tensors(256, 1024, heads=1, kv_heads=1)
    q[0] *= 1000
    share = block_share_ref(q, block_mean_ref(k, 128), context_len=768, block_size=128, softmax_scale=SCALE)
    assert torch.isfinite(share).all()
    assert share[0, 0].sum().item() == pytest.approx(1, rel=1e-4)
    assert share[0, 0].max() < 1 / 128 + 0.5


def test_min_share_keeps_what_reaches_it_and_alpha_0_everything():
    q, k, _ = tensors(1500, 1500)
    arguments = dict(context_len=0, prompt_len=1500, softmax_scale=SCALE)
    share = block_share_ref(q, block_mean_ref(k, 128), context_len=0, block_size=128, softmax_scale=SCALE)
    none = FlashPrefillConfig(alpha=1.0, num_sink_blocks=0, num_window_blocks=1, num_dense_tail_blocks=0)
    mask = select_blocks_ref(q, k, config=dataclasses.replace(none, min_share=0.2), **arguments)
    assert torch.equal(mask, ((share >= 0.2) | torch.eye(12, dtype=torch.bool)).tril())
    every = select_blocks_ref(q, k, config=dataclasses.replace(none, min_share=0.2, alpha=0.0), **arguments)
    assert torch.equal(every, torch.ones_like(mask).tril())


def test_what_is_always_kept():
    config = FlashPrefillConfig(alpha=1.0)
    score = torch.rand(2, 20, 20)
    score[..., 7] = 10.0
    score = score.tril()
    mask = block_select_ref(score, first_query_block=0, num_prompt_blocks=20, config=config)
    for i in range(20):
        expected = {j for j in range(i + 1) if j < 2 or i - j < 4 or i >= 18 or (j == 7 and i >= 7)}
        if i < 7:
            expected |= {int(score[0, i].argmax())}
        assert set(mask[0, i].nonzero().flatten().tolist()) == expected


def test_the_dense_tail_is_the_prompts_not_the_chunks():
    q, k, _ = tensors(1280, 2560)
    config = FlashPrefillConfig(alpha=1.0)
    kept = {
        prompt_len: select_blocks_ref(
            q, k[:1280], context_len=0, prompt_len=prompt_len, config=config, softmax_scale=SCALE
        )
        for prompt_len in (1280, 2560)
    }
    assert kept[1280][:, -2:].sum() == 4 * (9 + 10)
    assert kept[2560][:, -2:].sum() < 4 * (9 + 10)


@pytest.mark.parametrize("chunk", [128, 512, 896])
def test_aligned_chunks_select_what_one_pass_selects(chunk):
    config = FlashPrefillConfig(alpha=0.5)
    q, k, v = tensors(1900, 1900)
    arguments = dict(prompt_len=1900, config=config, softmax_scale=SCALE)
    whole = select_blocks_ref(q, k, context_len=0, **arguments)
    out = flash_prefill_ref(q, k, v, config=config, softmax_scale=SCALE)
    for start in range(0, 1900, chunk):
        end = min(1900, start + chunk)
        part = select_blocks_ref(q[start:end], k[:end], context_len=start, **arguments)
        blocks = slice(start // 128, start // 128 + part.shape[1])
        assert torch.equal(part, whole[:, blocks, : part.shape[2]])
        chunk_out = flash_prefill_ref(
            q[start:end], k[:end], v[:end], config=config, softmax_scale=SCALE, prompt_len=1900
        )
        torch.testing.assert_close(chunk_out, out[start:end])


def test_grouped_heads_equal_repeated_kv_heads():
    config = FlashPrefillConfig(alpha=0.5)
    q, k, v = tensors(1500, 1500, heads=6, kv_heads=2)
    grouped = flash_prefill_ref(q, k, v, config=config, softmax_scale=SCALE)
    repeated = flash_prefill_ref(
        q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1), config=config, softmax_scale=SCALE
    )
    torch.testing.assert_close(grouped, repeated)


def test_packed_sequences_equal_each_alone():
    config = FlashPrefillConfig(alpha=0.5)
    lengths = [1, 1500, 129, 1000]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    q, k, v = tensors(sum(lengths), sum(lengths))
    packed = flash_prefill_varlen(q, k, v, cu_seqlens, config=config, softmax_scale=SCALE)
    for a, b in itertools.pairwise(cu_seqlens):
        alone = flash_prefill_ref(q[a:b], k[a:b], v[a:b], config=config, softmax_scale=SCALE)
        torch.testing.assert_close(packed[a:b], alone)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(request_strategy, min_size=1, max_size=4),
    st.sampled_from([16, 48, 128, 256]),
    st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    st.integers(0, 2**31),
)
def test_random_paged_batches_at_alpha_0_equal_dense(requests, page_size, heads, seed):
    config = FlashPrefillConfig(alpha=0.0, min_sparse_tokens=0)
    num_heads, num_kv_heads = heads
    parts = [
        tensors(query, query + context, heads=num_heads, kv_heads=num_kv_heads, seed=seed + i)
        for i, (query, context, _) in enumerate(requests)
    ]
    q = torch.cat([part[0] for part in parts])
    k_cache, table = paged([part[1] for part in parts], page_size, seed=seed)
    v_cache, _ = paged([part[2] for part in parts], page_size, seed=seed)
    starts = torch.tensor([0, *torch.tensor([query for query, _, _ in requests]).cumsum(0)])
    seq_lens = torch.tensor([query + context for query, context, _ in requests])
    prompt_lens = seq_lens + torch.tensor([rest for _, _, rest in requests])
    plan = plan_step(starts.numpy(), seq_lens.numpy(), config, prompt_lens.numpy())

    poison = torch.full_like(q, torch.nan)
    kv = KeyValues(k_cache, v_cache, table)
    out = flash_prefill_paged_ref(q, kv, plan, config=config, softmax_scale=SCALE, out=poison)
    for request in plan.sparse:
        exact = brute_force.dense(*parts[request.index], softmax_scale=SCALE)
        assert brute_force.relative_error(out[request.query_slice], exact) < 1e-5
    for index in plan.dense:
        assert out[starts[index] : starts[index + 1]].isnan().all(), "rows of dense requests are not ours to write"
