"""What a key block's score can be made of: estimates of the attention that a query block's rows give to it.

A rule is KEYS.ROWS.HOW, KEYS.ROWS.HOW.cNN or KEYS.ROWS.HOW.mNN:

KEYS    what is looked at of a block: `exact` every key; `pN` the mean key of each N neighbours; `topN` that of them
        which has the row's largest logit; `kmN` the means of N clusters (k-means); `outN` the N keys farthest from the
        mean, and the mean of the others; `var` the mean key and the variance of each dimension.
ROWS    rows of the query block's 128 that are looked at, the last of each 128 / ROWS.
HOW     `pub` as published: the sum over rows, as a fraction of the largest block's. `max`: the largest logit of the
        block's keys and the rows in its place. `share`: the mean over rows of the share that the block has of the row's
        sum; `most`: the largest of these shares. `row`: the largest over rows of a block's fraction of the row's best.
cNN     only blocks whose published score is at least 0.NN of the best one's.
mNN     only the NN % of the blocks whose mean key has the largest logit with any row.

`published` is the published score; `published.head` puts in its place, by head, the share of exact attention that
blocks of that score had on a text (`HeadShares`). A new estimate joins by one function in `ESTIMATES`.

Shapes: H query heads, G KV heads, NQ query blocks of a chunk, NK key blocks, R rows looked at, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import torch

from vllm_flashprefill.config import BLOCK_SIZE, FlashPrefillConfig

DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
# KEYS that take a number.
SIZED = ("p", "top", "km", "out")
# In place of a maximum of nothing: -inf less this is -inf.
LEAST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class Rule:
    keys: str
    size: int = 0
    rows: int = BLOCK_SIZE
    how: str = "pub"
    candidates: float | None = None
    candidate_share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Raises ValueError for what is no rule."""
        if text in ("published", "published.head"):
            return cls("published", how="head" if text.endswith("head") else "pub")
        found = re.fullmatch(r"([a-z]+)(\d*)\.(\d+)\.(pub|max|share|most|row)(?:\.([cm])(\d+))?", text)
        if not found or found[1] not in ESTIMATES:
            raise ValueError(f"no rule: {text}")
        few = {"c": "candidates", "m": "candidate_share"}
        limit = {few[found[5]]: float(f"0.{found[6]}")} if found[5] else {}
        rule = cls(found[1], int(found[2] or 0), int(found[3]), found[4], **limit)
        if (rule.keys in SIZED) != (0 < rule.size < BLOCK_SIZE) or rule.rows not in DIVISORS:
            raise ValueError(f"no rule: {text}")
        if rule.keys in ("p", "top") and rule.size not in DIVISORS:
            raise ValueError(f"no rule: {text}")
        return rule

    @property
    def estimate(self) -> str:
        return self.keys + (str(self.size) if self.size else "")


class Chunk:
    """The queries of one chunk of a sequence, and the sequence's keys, in whole blocks.

    Args:
        q: [T, H, D], queries of the chunk. k: [S, G, D], keys of the sequence so far; its last T are the chunk's.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, *, softmax_scale: float) -> None:
        self.seq_len, self.scale = len(k), softmax_scale
        self.context_len = len(k) - len(q)
        first = self.context_len // BLOCK_SIZE
        # [H, NQ, 128, D] and [G, NK, 128, D]
        self.q = in_blocks(q, self.context_len - first * BLOCK_SIZE)
        self.k = in_blocks(k, 0)
        self.query_blocks = first + torch.arange(self.q.shape[1], device=q.device)
        self.key_blocks = torch.arange(self.k.shape[1], device=q.device)
        # [NQ, 128]
        positions = self.query_blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=q.device)
        self.in_chunk = (positions >= self.context_len) & (positions < self.seq_len)
        last = ((self.query_blocks + 1) * BLOCK_SIZE).clamp(max=self.seq_len) - 1
        self.last_row = positions == last[:, None]
        # [NQ, NK]
        self.own = self.key_blocks == self.query_blocks[:, None]
        self.earlier = self.key_blocks < self.query_blocks[:, None]

    def products(self, keys: torch.Tensor, rows: slice) -> torch.Tensor:
        """[H, NQ, R, NK]: scaled logits with one key a block, [G, NK, D] in float32."""
        q = self.q[:, :, rows].float()
        logits = q.reshape(len(keys), -1, q.shape[3]) @ keys.transpose(1, 2)
        return logits.mul_(self.scale).view(*q.shape[:3], -1)

    @functools.cached_property
    def mass(self) -> torch.Tensor:
        """[H, NQ, 128, NK], exact: log of a row's sum of exp(logit) over a block's keys; -inf where it sees none."""
        from research.block_mass import block_mass, block_mass_ref

        run = block_mass if self.q.is_cuda else block_mass_ref
        return run(self.q, self.k, context_len=self.context_len, seq_len=self.seq_len, scale=self.scale)

    @functools.cached_property
    def published(self) -> torch.Tensor:
        """[H, NQ, NK], the log of the published score, as a fraction of the largest."""
        lengths = (self.seq_len - self.key_blocks * BLOCK_SIZE).clamp(max=BLOCK_SIZE)
        logits = self.products(self.k.float().sum(dim=2) / lengths[:, None], slice(None))
        # Its own block is scored by the row that sees it whole.
        seen = self.earlier[:, None] & self.in_chunk[:, :, None] | self.own[:, None] & self.last_row[:, :, None]
        return fraction(logits.masked_fill_(~seen, -torch.inf).logsumexp(dim=2))

    @functools.cached_property
    def largest(self) -> torch.Tensor:
        """[H, NQ, NK], the largest logit of a block's mean key with any row, less the best block's."""
        logits = self.products(self.k.float().mean(dim=2), slice(None))
        seen = self.earlier[:, None] & self.in_chunk[:, :, None]
        return fraction(logits.masked_fill_(~seen, -torch.inf).amax(dim=2))

    def exact_share(self) -> torch.Tensor:
        """[H, NQ, NK]: the mean over rows of the share of a row's attention that a block has."""
        total = self.in_chunk.sum(dim=1).clamp(min=1)
        return shares(self.mass).exp().sum(dim=2) / total[:, None]

    def always(self, config: FlashPrefillConfig, first_tail_block: int) -> torch.Tensor:
        """[NQ, NK] bool: the blocks kept whatever their score, as of `reference.block_select_ref`."""
        i, j = self.query_blocks[:, None], self.key_blocks
        return (j < config.num_sink_blocks) | (i - j < config.num_window_blocks) | (i >= first_tail_block)


def in_blocks(x: torch.Tensor, lead: int) -> torch.Tensor:
    """[T, H, D] as [H, blocks, 128, D], with zeros before (`lead` of them) and after."""
    end = -(lead + len(x)) % BLOCK_SIZE
    padded = torch.nn.functional.pad(x.transpose(0, 1), (0, 0, lead, end))
    return padded.unflatten(1, (-1, BLOCK_SIZE)).contiguous()


def fraction(x: torch.Tensor) -> torch.Tensor:
    """Log scores of blocks as fractions of the largest."""
    return x - x.amax(dim=-1, keepdim=True).clamp(min=LEAST)


def shares(logits: torch.Tensor) -> torch.Tensor:
    """A softmax over blocks, as logarithms."""
    return logits - logits.logsumexp(dim=-1, keepdim=True).clamp(min=LEAST)


def exact(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    return chunk.mass[:, :, rows]


def pieces(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    means = chunk.k.float().unflatten(2, (-1, size)).mean(dim=3)
    return weighted_keys(chunk, rows, means, torch.full(means.shape[:3], math.log(size), device=means.device))


def largest_piece(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    means = chunk.k.float().unflatten(2, (-1, size)).mean(dim=3)
    largest = None
    for key in means.unbind(2):
        logits = chunk.products(key, rows)
        largest = logits if largest is None else torch.maximum(largest, logits, out=largest)
    return largest


def weighted_keys(chunk: Chunk, rows: slice, keys: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """A few keys stand for a block: [G, NK, C, D], and the logarithms of how many each stands for, [G, NK, C]."""
    total = None
    for key, log_weight in zip(keys.unbind(2), log_weights.unbind(2), strict=True):
        logits = chunk.products(key, rows)
        logits += log_weight.repeat_interleave(len(logits) // len(key), dim=0)[:, None, None]
        total = logits if total is None else torch.logaddexp(total, logits)
    return total


def clusters(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    """k-means from the keys farthest from those chosen before."""
    k = chunk.k.float()
    chosen = k.mean(dim=2, keepdim=True)
    distance = (k - chosen).square().sum(dim=-1)
    while chosen.shape[2] < size:
        at = distance.argmax(dim=-1)[:, :, None, None].expand(-1, -1, 1, k.shape[3])
        farthest = k.gather(2, at)
        chosen = torch.cat([chosen, farthest], dim=2)
        distance = distance.minimum((k - farthest).square().sum(dim=-1))
    for _ in range(4):
        distances = chosen.square().sum(dim=-1)[:, :, None] - 2 * k @ chosen.transpose(2, 3)
        members = torch.nn.functional.one_hot(distances.argmin(dim=-1), size).float()
        counts = members.sum(dim=2)
        means = members.transpose(2, 3) @ k / counts.clamp(min=1)[..., None]
        chosen = torch.where(counts[..., None] > 0, means, chosen)
    return weighted_keys(chunk, rows, chosen, counts.clamp(min=1e-6).log())


def outliers(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    k = chunk.k.float()
    distance = (k - k.mean(dim=2, keepdim=True)).square().sum(dim=-1)
    at = distance.topk(size, dim=-1).indices[..., None].expand(-1, -1, -1, k.shape[3])
    farthest = k.gather(2, at)
    rest = (k.sum(dim=2) - farthest.sum(dim=2)) / (BLOCK_SIZE - size)
    log_weights = torch.zeros(farthest.shape[0], farthest.shape[1], size + 1, device=k.device)
    log_weights[..., 0] = math.log(BLOCK_SIZE - size)
    return weighted_keys(chunk, rows, torch.cat([rest[:, :, None], farthest], dim=2), log_weights)


def variance(chunk: Chunk, rows: slice, size: int) -> torch.Tensor:
    """The mean of exp(x) over a block's keys, x = q . k, is exp(E x + Var x / 2 + ...); of Var x the diagonal part."""
    k, q = chunk.k.float(), chunk.scale * chunk.q[:, :, rows].float()
    variances = k.var(dim=2, correction=0)
    second = q.square().reshape(len(k), -1, q.shape[3]) @ variances.transpose(1, 2)
    return chunk.products(k.mean(dim=2), rows) + second.view(*q.shape[:3], -1) / 2


# By KEYS, [H, NQ, R, NK] float32: log of the sum that some rows of each query block would have over the keys of each
# block, to within a number for all blocks. Only blocks before the query block are asked for.
ESTIMATES: dict[str, Callable[[Chunk, slice, int], torch.Tensor]] = {
    "exact": exact,
    "p": pieces,
    "top": largest_piece,
    "km": clusters,
    "out": outliers,
    "var": variance,
}


class HeadShares:
    """Of each layer and head, the share of exact attention to expect of a block by its published score."""

    BINS = 48

    def __init__(self) -> None:
        self.samples: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(self, chunk: Chunk, layer: int, free: torch.Tensor) -> None:
        """Takes a sample of the blocks `free`, [NQ, NK] bool."""
        pair = chunk.published[:, free][:, ::7], chunk.exact_share()[:, free][:, ::7]
        self.samples.setdefault(layer, []).append(pair)

    def fit(self) -> None:
        """Bins of as many blocks each, and their mean shares, made to rise with the score."""
        for layer, parts in self.samples.items():
            score, share = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
            score, order = score.sort(dim=1)
            size = score.shape[1] // self.BINS
            score, share = (
                x[:, : size * self.BINS].unflatten(1, (self.BINS, size)) for x in (score, share.gather(1, order))
            )
            rising = share.mean(dim=2).clamp(min=1e-12).log().cummax(dim=1).values
            # Equal bins keep their order, so that a threshold can fall between them.
            rising = rising + 1e-4 * torch.arange(self.BINS, device=rising.device)
            self.tables[layer] = score[:, :, -1].contiguous(), rising
        self.samples.clear()

    def expected(self, score: torch.Tensor, layer: int) -> torch.Tensor:
        """[H, NQ, NK] log shares of published scores."""
        edges, values = self.tables[layer]
        at = torch.searchsorted(edges, score.flatten(1).contiguous()).clamp(max=self.BINS - 1)
        return values.gather(1, at).view_as(score)


def block_scores(
    chunk: Chunk, rule: Rule, layer: int = 0, heads: HeadShares | None = None, least: float | None = None
) -> torch.Tensor:
    """[H, NQ, NK] float32 log scores; a block before the query block's own is kept from a threshold on.

    least: of a candidate's `Chunk.largest`, where the rule has a candidate_share.
    """
    if rule.keys == "published":
        return chunk.published if rule.how == "pub" else heads.expected(chunk.published, layer)
    step = BLOCK_SIZE // rule.rows
    rows = slice(step - 1, None, step)
    logits = ESTIMATES[rule.keys](chunk, rows, rule.size)
    seen = chunk.earlier[:, None] & chunk.in_chunk[:, rows, None]
    if rule.candidates is not None:
        seen = seen & (chunk.published >= math.log(rule.candidates))[:, :, None]
    if least is not None:
        seen = seen & (chunk.largest >= least)[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    if rule.how == "max":
        return fraction(logits.amax(dim=2))
    if rule.how == "share":
        return shares(logits).logsumexp(dim=2) - math.log(rule.rows)
    if rule.how == "row":
        return fraction(logits).amax(dim=2)
    if rule.how == "most":
        return shares(logits).amax(dim=2)
    return fraction(logits.logsumexp(dim=2))
