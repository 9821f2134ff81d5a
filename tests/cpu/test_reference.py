import dataclasses
import itertools
import math

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
    flash_prefill_paged_ref,
    flash_prefill_ref,
    piece_score_ref,
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


def alike_in_pieces(k, size):
    """The keys, those of each piece of that size equal to its first; a last, partial one is left as it is."""
    whole = len(k) // size * size
    return torch.cat([k[:whole:size].repeat_interleave(size, dim=0), k[whole:]])


@pytest.mark.parametrize("context_len", [0, 301, 384])
def test_pieces_of_equal_keys_score_the_largest_share_of_a_rows_best_key(context_len):
    seq_len = context_len + 500
    q, k, _ = tensors(500, seq_len, heads=2, kv_heads=1)
    k = alike_in_pieces(k, 4)
    config = FlashPrefillConfig(piece_size=4, candidate_alpha=0.0)
    score = piece_score_ref(q, k, context_len=context_len, config=config, softmax_scale=SCALE)
    assert score.shape == (2, -(-seq_len // 128) - context_len // 128, -(-seq_len // 128))
    for index in range(score.shape[1]):
        own = context_len // 128 + index
        assert (score[:, index, own:] == 0).all()
        rows = torch.arange(max(context_len, own * 128), min(seq_len, (own + 1) * 128)) - context_len
        for head in range(2 if own else 0):
            logits = SCALE * q[rows, head].double() @ k[: own * 128, 0].double().T
            largest = logits.exp().unflatten(1, (own, 128)).amax(dim=2)
            expected = (largest / largest.amax(dim=1, keepdim=True)).amax(dim=0)
            torch.testing.assert_close(score[head, index, :own].double(), expected, rtol=1e-4, atol=0)


def test_a_row_keeps_what_the_others_outweigh():
    q, k, _ = tensors(1400, 1400, heads=1, kv_heads=1)
    # Every row but one has large logits with block 1, that one only with block 5.
    direction = torch.nn.functional.normalize(q[0, 0], dim=0)
    k[128:256, 0] += 40 * direction
    q[1024:1152, 0] += 8 * direction
    q[1100, 0] -= 8 * direction
    k[640:648, 0] += 3 * q[1100, 0]
    arguments = dict(context_len=0, softmax_scale=SCALE)
    config = FlashPrefillConfig(candidate_alpha=0.0)
    pieces = piece_score_ref(q, k, config=config, **arguments)[0, 8]
    assert pieces[1] == pieces[5] == 1
    # By the sum over rows, as blocks scored whole are.
    whole = block_score_ref(q, block_mean_ref(k, 8), block_size=8, **arguments)[0, 128:144]
    assert whole[:, 80].max() < 0.01 * whole[:, 16:32].max()


def test_one_strong_key_shows_in_its_piece_and_not_in_the_mean_of_its_block():
    q, k, _ = tensors(1400, 1400, heads=1, kv_heads=1)
    k[300, 0] += 22 * q[1100, 0]
    config = FlashPrefillConfig(candidate_alpha=0.0)
    arguments = dict(context_len=1100, softmax_scale=SCALE)
    pieces = piece_score_ref(q[1100:1101], k[:1101], config=config, **arguments)[0, 0]
    whole = block_score_ref(q[1100:1101], block_mean_ref(k[:1101], 128), block_size=128, **arguments)[0, 0]
    others = [0, 1, 3, 4, 5, 6, 7]
    assert pieces[2] == 1 > 2 * pieces[others].max()
    assert whole[2] < whole[others].max()


@pytest.mark.parametrize("candidate_alpha", [0.05, 0.5, 1.0])
def test_only_candidates_have_a_score(candidate_alpha):
    q, k, _ = tensors(1024, 1536)
    arguments = dict(context_len=512, softmax_scale=SCALE)
    looked_at = FlashPrefillConfig(candidate_alpha=candidate_alpha)
    score = piece_score_ref(q, k, config=looked_at, **arguments)
    every = piece_score_ref(q, k, config=dataclasses.replace(looked_at, candidate_alpha=0.0), **arguments)
    for index in range(8):
        own = 4 + index
        # The published score, of blocks that all rows see whole.
        rows = q[index * 128 : (index + 1) * 128].transpose(0, 1)
        mean = block_mean_ref(k[: own * 128], 128).repeat_interleave(2, dim=1).permute(1, 2, 0)
        coarse = (SCALE * rows @ mean).logsumexp(dim=1)
        candidate = coarse >= coarse.amax(dim=1, keepdim=True) + math.log(candidate_alpha)
        assert torch.equal(score[:, index, :own] > 0, candidate)
        # Among themselves they are as they are among all.
        for head in range(4):
            found, expected = (x[head, index, :own][candidate[head]] for x in (score, every))
            torch.testing.assert_close(found / found.max(), expected / expected.max(), rtol=1e-4, atol=0)
    none = FlashPrefillConfig(alpha=1e-6, candidate_alpha=candidate_alpha, num_sink_blocks=0, num_window_blocks=1)
    mask = select_blocks_ref(q, k, prompt_len=4096, config=none, **arguments)
    own = torch.eye(12, dtype=torch.bool)[4:]
    assert torch.equal(mask, (score > 0) | own)


def test_candidate_alpha_0_looks_at_every_block():
    q, k, _ = tensors(1400, 1400)
    config = FlashPrefillConfig(candidate_alpha=0.0)
    score = piece_score_ref(q, k, context_len=0, config=config, softmax_scale=SCALE)
    assert torch.equal(score > 0, torch.ones(4, 11, 11, dtype=torch.bool).tril(-1))


def test_piece_scores_survive_logits_no_exponential_can_hold():
    q, k, _ = tensors(700, 700)
    score = piece_score_ref(100 * q, k, context_len=0, config=FlashPrefillConfig(), softmax_scale=1.0)
    assert torch.isfinite(score).all()
    assert (score[:, 1:].amax(dim=-1) >= 1).all()


@pytest.mark.parametrize("options", [{}, {"candidate_alpha": 1.0}, {"piece_size": 64}, {"piece_size": 0}], ids=str)
def test_alpha_0_keeps_everything(options):
    q, k, _ = tensors(1500, 1700)
    config = FlashPrefillConfig(alpha=0.0, num_sink_blocks=0, num_window_blocks=1, num_dense_tail_blocks=0, **options)
    mask = select_blocks_ref(q, k, context_len=200, prompt_len=1700, config=config, softmax_scale=SCALE)
    assert torch.equal(mask, torch.ones_like(mask).tril(1))


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
    config = FlashPrefillConfig(alpha=1.0, piece_size=0)
    kept = {
        prompt_len: select_blocks_ref(
            q, k[:1280], context_len=0, prompt_len=prompt_len, config=config, softmax_scale=SCALE
        )
        for prompt_len in (1280, 2560)
    }
    assert kept[1280][:, -2:].sum() == 4 * (9 + 10)
    assert kept[2560][:, -2:].sum() < 4 * (9 + 10)


@pytest.mark.parametrize("options", [{}, {"piece_size": 32, "candidate_alpha": 0.2}, {"piece_size": 0}], ids=str)
@pytest.mark.parametrize("chunk", [128, 512, 896])
def test_aligned_chunks_select_what_one_pass_selects(chunk, options):
    config = FlashPrefillConfig(alpha=0.5, **options)
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
