import math

import pytest
import torch

from research.block_scores import Chunk, HeadShares, Rule, block_scores
from tests.cpu.kernels.test_interpreted import needs_triton, run_interpreted
from tests.support.plain_cases import SCALE, tensors
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.reference import block_mean_ref, block_score_ref, block_select_ref, piece_score_ref

# (tokens of the chunk, tokens before it)
CHUNKS = [(1000, 0), (700, 512), (600, 200)]


def make_chunk(num_tokens, context_len, dim=16):
    q, k, _ = tensors(num_tokens, num_tokens + context_len, dim=dim)
    return q, k, Chunk(q, k, softmax_scale=SCALE)


def scores(chunk, text, **arguments):
    return block_scores(chunk, Rule.parse(text), **arguments)


@pytest.mark.parametrize("how", ["128.pub", "128.share", "128.most", "128.row", "16.pub"])
def test_pieces_of_one_key_and_as_many_clusters_as_keys_are_exact(how):
    _, _, chunk = make_chunk(180, 200)
    expected = scores(chunk, f"exact.{how}")
    assert (expected > -torch.inf).any()
    torch.testing.assert_close(scores(chunk, f"p1.{how}"), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores(chunk, f"out127.{how}"), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores(chunk, f"km127.{how}"), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("lengths", CHUNKS)
def test_exact_share_is_that_of_a_softmax(lengths):
    q, k, chunk = make_chunk(*lengths)
    num_tokens, context_len = lengths
    s = SCALE * torch.einsum("tgrd,sgd->grts", q.unflatten(1, (2, 2)), k).flatten(0, 1)
    hidden = torch.ones(num_tokens, num_tokens + context_len, dtype=torch.bool).triu(context_len + 1)
    attention = s.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    by_block = torch.stack([part.sum(dim=-1) for part in attention.split(128, dim=2)], dim=2)
    rows = torch.tensor([128 - context_len % 128, *[128] * len(by_block[0])]).cumsum(0)
    parts = by_block.tensor_split([int(row) for row in rows if row < num_tokens], dim=1)
    expected = torch.stack([part.mean(dim=1) for part in parts], dim=1)
    torch.testing.assert_close(chunk.exact_share(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", CHUNKS)
def test_published_is_the_packages_score(lengths):
    q, k, chunk = make_chunk(*lengths)
    expected = block_score_ref(
        q, block_mean_ref(k, 128), context_len=chunk.context_len, block_size=128, softmax_scale=SCALE
    )
    expected = (expected / expected.amax(dim=-1, keepdim=True).clamp(min=1e-30)).log()
    torch.testing.assert_close(scores(chunk, "published"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", CHUNKS)
def test_the_largest_pieces_of_8_by_row_select_as_the_package(lengths):
    q, k, chunk = make_chunk(*lengths)
    config = FlashPrefillConfig(alpha=0.5, piece_size=8, candidate_alpha=0.0)
    score = piece_score_ref(q, k, context_len=chunk.context_len, config=config, softmax_scale=SCALE)
    found = scores(chunk, "top8.128.row")
    expected = (score / score.amax(dim=-1, keepdim=True).clamp(min=1e-30)).log()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    tail = chunk.seq_len // 128 - 1
    prompt_blocks = tail + config.num_dense_tail_blocks
    kept = block_select_ref(
        score, first_query_block=chunk.context_len // 128, num_prompt_blocks=prompt_blocks, config=config
    )
    mine = ((found >= math.log(config.alpha)) | chunk.always(config, tail)) & (chunk.earlier | chunk.own)
    tie = (found - math.log(config.alpha)).abs() < 1e-3
    assert ((mine == kept) | tie).all()
    assert tie.float().mean() < 0.01 and 0.1 < kept[:, :, 2:].float().mean() < 0.9


def test_fewer_rows_see_the_last_of_each_step():
    q, k, chunk = make_chunk(1024, 0)
    rows = torch.arange(1024) % 32 == 31
    others = torch.where(rows[:, None, None], q, torch.randn_like(q))
    changed = Chunk(others, k, softmax_scale=SCALE)
    for rule in ("exact.4.pub", "p16.4.share", "km2.4.pub", "out3.4.pub", "var.4.pub"):
        torch.testing.assert_close(scores(chunk, rule), scores(changed, rule), rtol=0, atol=1e-5)
    assert not torch.allclose(scores(chunk, "p16.8.pub"), scores(changed, "p16.8.pub"))


def test_candidates_are_the_best_by_the_published_score():
    _, _, chunk = make_chunk(1000, 128)
    candidates = (scores(chunk, "published") >= math.log(0.3)) & chunk.earlier
    every, some = scores(chunk, "exact.128.pub"), scores(chunk, "exact.128.pub.c3")
    assert torch.equal(some > -torch.inf, candidates)
    assert 0 < candidates.float().mean() < 0.4
    # The same but for the largest, which may be no candidate.
    moved = (some - every)[:, -1].where(candidates[:, -1], torch.nan)
    for head in moved:
        torch.testing.assert_close(head[~head.isnan()], head.nanmean().expand(int((~head.isnan()).sum())))


def test_variance_is_exact_to_second_order():
    """Of keys that differ in one dimension alone, by little."""
    q, k, _ = tensors(512, 512)
    k = k.view(4, 128, 2, 16).mean(dim=1, keepdim=True).repeat(1, 128, 1, 1).flatten(0, 1)
    k[:, :, 3] += 0.3 * torch.randn(512, 2, generator=torch.Generator().manual_seed(1))
    chunk = Chunk(q, k, softmax_scale=SCALE)
    expected = scores(chunk, "exact.128.pub")
    seen = expected > -torch.inf
    by_variance, by_mean = (
        (scores(chunk, rule) - expected)[seen].abs().max() for rule in ("var.128.pub", "p64.128.pub")
    )
    assert by_variance < 1e-3 < by_mean


def test_heads_learn_what_a_score_is_worth():
    _, _, chunk = make_chunk(128 * 40, 0)
    heads = HeadShares()
    heads.see(chunk, 5, chunk.earlier)
    heads.fit()
    found = scores(chunk, "published.head", layer=5, heads=heads)
    order = scores(chunk, "published")[:, chunk.earlier].argsort(dim=1)
    in_order = found[:, chunk.earlier].gather(1, order)
    assert (in_order.diff(dim=1) >= 0).all()
    for head, share in zip(found, chunk.exact_share(), strict=True):
        expected, actual = head[chunk.earlier].exp(), share[chunk.earlier]
        assert 0.5 < float(expected.sum() / actual.sum()) < 2
        assert float(torch.corrcoef(torch.stack([expected, actual]))[0, 1]) > 0.3


@pytest.mark.parametrize(
    "text", ["exact", "exact.128", "p.128.pub", "p3.128.pub", "p8.48.pub", "p8.0.pub", "exact8.128.pub", "p8.128.mean",
             "mean.128.pub", "out128.128.pub", "published.share"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError, match=f"no rule: {text}"):
        Rule.parse(text)


@needs_triton
def test_the_kernel_agrees_with_pytorch():
    run_interpreted(
        "import torch\nfrom research.block_mass import check_block_mass\n"
        "assert check_block_mass(torch.device('cpu'), torch.float16, head_size=16) < 1e-3"
    )
