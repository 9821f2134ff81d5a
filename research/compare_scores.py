"""Which block score keeps most of the exact attention at equal density, on captured queries, keys and values.

Each score ranks key blocks for a query block; how many it keeps is set by a threshold, chosen here so that the mean
density equals the published score's. Reported for each: recall, the share of a row's exact softmax mass that lies in
kept blocks (mean over rows, and its 5th percentile over rows), and the error of the output against dense attention in
float64, relative to it, over the rows of a head; means over heads. "even" gives each head the published score's
density in that head, instead of one threshold for all. Rows counted are those of sampled query blocks in which
something may be pruned. "corrected" is with mean correction: a pruned block takes part in attention as one token that
has its mean key and value and the weight of all its tokens.

    python -m research.capture_qkv --out /tmp/docs.pt
    python -m research.compare_scores /tmp/docs.pt --alphas 0.01 0.05 0.18

Words: s[r, j] is row r's scaled logit with the mean key of block j; a score is an E[i, j] of query block i, held as its
logarithm, and j is kept where E >= alpha * max_j E, except where a name says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch

BLOCK = 128
NUM_SINK_BLOCKS, NUM_WINDOW_BLOCKS, NUM_DENSE_TAIL_BLOCKS = 2, 4, 2
# What the published method costs in stage 2 is 1 product of a query block with the mean keys.
SCORES = {
    "published": "sum over rows of exp(s), one maximum for all rows; 1 product",
    "row max": "each row's exp(s) divided by its largest; the maximum must be known before the sum: 2 products",
    "row sum": "each row's exp(s) divided by its sum over blocks (a softmax over mean keys); 2 products",
    "row sum, max": "as row sum, the largest row instead of the sum over rows; 2 products",
    "row sum, absolute": "as row sum, kept where the mean over rows is at least alpha; 2 products",
    "row sum, top p": "as row sum, the fewest blocks that hold a share p; 2 products and a sort",
    "row exact": "as row sum, but the row's sum has the exact sink and window blocks; 2 products, 6 blocks of keys",
    "row exact, absolute": "as row exact, kept where the mean over rows is at least alpha",
    "row exact ends, absolute": "the same with the first and the own block exact; 2 products, 2 blocks of keys",
    "row near, absolute": "exp(s) by the exact mass of sink and window blocks alone; 1 product, 6 blocks of keys",
    "row near ends, absolute": "the same with the first and the own block alone; 1 product, 2 blocks of keys",
    "halves, max": "two means a block, the larger logit; 2 products",
    "quarters, max": "four means a block, the largest logit; 4 products",
    "quarters, lse": "four means a block, the log-sum-exp of their logits; 4 products",
    "key max": "mean key beside the elementwise largest and smallest: the mean of s and its upper bound; 3 products",
    "variance": "s + q^2 . var(k) / 2; 2 products",
    "covariance": "s + q . cov(k) q / 2 with the whole covariance; D products, no candidate",
    "group": "published, log-sum-exp over the heads that share a KV head, which then keep the same blocks",
    "quarters, row sum": "quarters lse, then row sum; 8 products",
    "quarters, absolute": "quarters lse, then row exact, absolute; 8 products, 6 blocks of keys",
    "variance, row sum": "variance, then row sum; 4 products",
    "exact": "exact mass of each block, mean over rows, absolute: the best that any score can do for mean recall",
}


def query_blocks(seq_len: int, every: int) -> list[int]:
    """Whole query blocks outside the dense tail in which some block may be pruned, one in `every`."""
    num_blocks = -(-seq_len // BLOCK)
    return list(range(NUM_SINK_BLOCKS + NUM_WINDOW_BLOCKS, num_blocks - max(NUM_DENSE_TAIL_BLOCKS, 1), every))


def by_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[S, G, D] as [H, S, D]."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1).transpose(0, 1)


class Layer:
    """One layer's captured tensors, and what scores take from its keys: all before the query block alone."""

    def __init__(self, captured: dict) -> None:
        self.scale = captured["softmax_scale"]
        self.q = captured["q"].float().transpose(0, 1)
        self.num_heads, self.seq_len, self.head_size = self.q.shape
        self.group = self.num_heads // captured["k"].shape[1]
        self.k = by_head(captured["k"].float(), self.num_heads)
        self.v = by_head(captured["v"].float(), self.num_heads)
        whole = self.seq_len // BLOCK
        # [H, NK, BLOCK, D], whole blocks only: no query block here sees another one but its own.
        self.k_blocks = self.k[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))
        self.v_mean = self.v[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).mean(dim=2)
        self.k_mean = self.k_blocks.mean(dim=2)
        self.k_var = self.k_blocks.var(dim=2, correction=0)
        self.k_largest, self.k_smallest = self.k_blocks.amax(dim=2), self.k_blocks.amin(dim=2)
        self.halves = self.k_blocks.unflatten(2, (2, -1)).mean(dim=3)
        self.quarters = self.k_blocks.unflatten(2, (4, -1)).mean(dim=3)
        centred = self.k_blocks - self.k_mean[:, :, None]
        self.k_cov = centred.transpose(2, 3) @ centred / BLOCK

    def rows(self, i: int) -> torch.Tensor:
        """[H, BLOCK, D], a query block's rows."""
        return self.q[:, i * BLOCK : (i + 1) * BLOCK]

    def exact(self, i: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [H, BLOCK, tokens] of a query block's rows, -inf after them, and their log-sum-exp by key block."""
        end = (i + 1) * BLOCK
        logits = self.scale * (self.rows(i).to(dtype) @ self.k[:, :end].to(dtype).transpose(1, 2))
        hidden = torch.ones(BLOCK, end, dtype=torch.bool).triu(i * BLOCK + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
        return logits, logits.unflatten(2, (i + 1, BLOCK)).logsumexp(dim=3)

    def variance(self, i: int) -> torch.Tensor:
        """[H, BLOCK, i]: q^2 . var(k) / 2 with scaled q.

        The mean of exp(x) over a block's keys, x = q . k, is exp(E x + Var x / 2 + ...), the cumulants of x. Var x is
        q . cov(k) q, of which this takes the diagonal.
        """
        return 0.5 * (self.scale * self.rows(i)).square() @ self.k_var[:, :i].transpose(1, 2)

    def covariance(self, i: int) -> torch.Tensor:
        """[H, BLOCK, i]: q . cov(k) q / 2 with scaled q."""
        q = self.scale * self.rows(i)
        return 0.5 * torch.einsum("hrd,hjde,hre->hrj", q, self.k_cov[:, :i], q)

    def scores(self, i: int) -> dict[str, torch.Tensor]:
        """By name, [H, i] log scores of the key blocks before the query block's own.

        A difference of two of them is what a threshold is compared with: relative to the largest unless absolute.
        """
        q = self.scale * self.rows(i)
        s = q @ self.k_mean[:, :i].transpose(1, 2)
        _, exact = self.exact(i, torch.float32)
        halves, quarters = (torch.einsum("hrd,hjmd->hrjm", q, means[:, :i]) for means in (self.halves, self.quarters))
        quarters_lse = quarters.logsumexp(dim=3) - math.log(4)
        bound = q.clamp(min=0) @ self.k_largest[:, :i].transpose(1, 2)
        bound = bound + q.clamp(max=0) @ self.k_smallest[:, :i].transpose(1, 2)
        varied = s + self.variance(i)

        def over_rows(x: torch.Tensor) -> torch.Tensor:
            return x.logsumexp(dim=1) - math.log(BLOCK)

        def relative(x: torch.Tensor) -> torch.Tensor:
            return x - x.amax(dim=-1, keepdim=True)

        def row_sum(x: torch.Tensor) -> torch.Tensor:
            return x - x.logsumexp(dim=2, keepdim=True)

        j = torch.arange(i + 1)
        always = (j < NUM_SINK_BLOCKS) | (i - j < NUM_WINDOW_BLOCKS)
        ends = (j == 0) | (j == i)

        def row_exact(x: torch.Tensor, known: torch.Tensor = always) -> torch.Tensor:
            """Shares of a row's sum in which the blocks `known` are exact."""
            mixed = torch.where(known, exact, torch.nn.functional.pad(x + math.log(BLOCK), (0, 1)))
            return (mixed - mixed.logsumexp(dim=2, keepdim=True))[:, :, :i]

        def row_near(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
            """x as a multiple of the exact mass in the blocks `known` alone, at most 1."""
            return (x + math.log(BLOCK) - exact[:, :, known].logsumexp(dim=2, keepdim=True)).clamp(max=0)

        # Its own block is scored too, by the one row that sees it whole.
        own = torch.einsum("hd,hd->h", q[:, -1], self.k_mean[:, i])[:, None] - math.log(BLOCK)
        published = over_rows(s)
        share = over_rows(row_sum(s))
        ordered = share.sort(dim=-1, descending=True)
        before = ordered.values.exp().cumsum(dim=-1) - ordered.values.exp()
        top_p = torch.empty_like(share).scatter_(-1, ordered.indices, -before)
        grouped = published.unflatten(0, (-1, self.group)).logsumexp(dim=1)
        return {
            "published": published - published.amax(dim=-1, keepdim=True).maximum(own),
            "row max": relative(over_rows(s - s.amax(dim=2, keepdim=True))),
            "row sum": relative(share),
            "row sum, max": relative(row_sum(s).amax(dim=1)),
            "row sum, absolute": share,
            "row sum, top p": top_p,
            "row exact": relative(over_rows(row_exact(s))),
            "row exact, absolute": over_rows(row_exact(s)),
            "row exact ends, absolute": over_rows(row_exact(s, ends)),
            "row near, absolute": over_rows(row_near(s, always)),
            "row near ends, absolute": over_rows(row_near(s, ends)),
            "halves, max": relative(over_rows(halves.amax(dim=3))),
            "quarters, max": relative(over_rows(quarters.amax(dim=3))),
            "quarters, lse": relative(over_rows(quarters_lse)),
            "key max": relative(over_rows((s + bound) / 2)),
            "variance": relative(over_rows(varied)),
            "covariance": relative(over_rows(s + self.covariance(i))),
            "group": relative(grouped.repeat_interleave(self.group, dim=0)),
            "quarters, row sum": relative(over_rows(row_sum(quarters_lse))),
            "quarters, absolute": over_rows(row_exact(quarters_lse)),
            "variance, row sum": relative(over_rows(row_sum(varied))),
            "exact": over_rows(exact - exact.logsumexp(dim=2, keepdim=True))[:, :i],
        }


def prunable(i: int) -> torch.Tensor:
    """[i] bool: which key blocks before query block i are kept for their score alone."""
    j = torch.arange(i)
    return (j >= NUM_SINK_BLOCKS) & (i - j >= NUM_WINDOW_BLOCKS)


def kth_largest(scores: torch.Tensor, count: int) -> float:
    """The threshold that `count` of some scores reach."""
    return math.inf if count == 0 else float(scores.sort(descending=True).values[count - 1])


class Selections:
    """The scores of all layers and query blocks, and the masks that equal densities make of them."""

    def __init__(self, layers: list[Layer], every: int) -> None:
        # One tensor a name, layer and head: all its scores in order of query block.
        self.rows: dict[str, list[torch.Tensor]] = {name: [] for name in SCORES}
        self.blocks = [query_blocks(layer.seq_len, every) for layer in layers]
        for layer, blocks in zip(layers, self.blocks, strict=True):
            parts = [{name: x[:, prunable(i)] for name, x in layer.scores(i).items()} for i in blocks]
            for name in SCORES:
                self.rows[name] += torch.cat([part[name] for part in parts], dim=1).unbind()

    def thresholds(self, alpha: float, even: bool) -> dict[str, list[float]]:
        """A threshold for each name, layer and head, under which it keeps as much as the published score at alpha."""
        kept = [int((x >= math.log(alpha)).sum()) for x in self.rows["published"]]
        if even:
            return {
                name: [kth_largest(x, count) for x, count in zip(rows, kept, strict=True)]
                for name, rows in self.rows.items()
            }
        return {name: [kth_largest(torch.cat(rows), sum(kept))] * len(rows) for name, rows in self.rows.items()}


@dataclasses.dataclass
class Measured:
    """What one set of masks does in one layer: rows of `recall` are heads; error, norm, kept, visible are [H] sums."""

    recall: list[torch.Tensor]
    error: torch.Tensor
    norm: torch.Tensor
    kept: torch.Tensor
    visible: torch.Tensor


def measure(layers: list[Layer], selections: Selections, thresholds: dict, corrected: set) -> dict[tuple, Measured]:
    """By name of a list of thresholds, with or without mean correction, and layer; names in `corrected` have both."""
    found: dict[tuple, Measured] = {}
    cases = [(name, correct) for name in thresholds for correct in (False, True) if not correct or name in corrected]
    for number, (layer, blocks) in enumerate(zip(layers, selections.blocks, strict=True)):
        first_head = sum(each.num_heads for each in layers[:number])
        heads = slice(first_head, first_head + layer.num_heads)
        done = 0
        for i in blocks:
            logits, by_block = layer.exact(i, torch.float64)
            total = by_block.logsumexp(dim=2, keepdim=True)
            p = (logits - total).exp().unflatten(2, (i + 1, BLOCK))
            values = layer.v[:, : (i + 1) * BLOCK].double().unflatten(1, (i + 1, BLOCK))
            # [H, i + 1, BLOCK] and [H, i + 1, BLOCK, D]: what each key block adds to a row's mass and output.
            mass = (by_block - total).exp().transpose(1, 2)
            parts = torch.einsum("hrjt,hjtd->hjrd", p, values)
            out = parts.sum(dim=1)
            s = layer.scale * (layer.rows(i) @ layer.k_mean[:, :i].transpose(1, 2)).double()
            pseudo = (s + math.log(BLOCK) - total).exp().transpose(1, 2)
            pseudo_parts = torch.einsum("hjr,hjd->hjrd", pseudo, layer.v_mean[:, :i].double())

            free = prunable(i)
            now = slice(done, done + int(free.sum()))
            done = now.stop
            kept = torch.ones(layer.num_heads, len(cases), i + 1, dtype=torch.bool)
            for n, (name, _) in enumerate(cases):
                score, limits = thresholds[name]
                scores = torch.stack([x[now] for x in selections.rows[score][heads]])
                kept[:, n, :i][:, free] = scores >= torch.tensor(limits[heads])[:, None]
            weights = kept.double()
            recall = weights @ mass
            norm, kept_out = recall, (weights @ parts.flatten(2)).unflatten(2, out.shape[1:])
            pruned = torch.tensor([correct for _, correct in cases])[:, None] * (1 - weights[..., :i])
            norm = norm + pruned @ pseudo
            kept_out = kept_out + (pruned @ pseudo_parts.flatten(2)).unflatten(2, out.shape[1:])
            error = (kept_out / norm[..., None] - out[:, None]).square().sum(dim=(2, 3))
            for n, case in enumerate(cases):
                part = found.setdefault((*case, number), Measured([], 0, 0, 0, 0))
                part.recall.append(recall[:, n])
                part.error = part.error + error[:, n]
                part.norm = part.norm + out.square().sum(dim=(1, 2))
                part.kept = part.kept + kept[:, n].sum(dim=1)
                part.visible = part.visible + torch.full((layer.num_heads,), i + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="from research/capture_qkv.py")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.01, 0.05, 0.18], help="of the published score")
    parser.add_argument("--layers", type=int, nargs="+", help="of each file, all by default")
    parser.add_argument("--every", type=int, default=4, help="take one query block in so many (default: %(default)s)")
    parser.add_argument("--correct", nargs="*", default=["published"], help="scores to measure mean correction with")
    parser.add_argument("--by-layer", action="store_true", help="a line for each layer too")
    options = parser.parse_args()

    numbers, layers = [], []
    for file in options.files:
        for number, captured in torch.load(file).items():
            if options.layers is None or number in options.layers:
                numbers.append(f"{file} layer {number}")
                layers.append(Layer(captured))
    selections = Selections(layers, options.every)
    thresholds, corrected = {}, set()
    for alpha in options.alphas:
        for even in (False, True):
            for score, limits in selections.thresholds(alpha, even).items():
                name = (alpha, even, score)
                thresholds[name] = (score, limits)
                if score in options.correct and not even:
                    corrected.add(name)

    found = measure(layers, selections, thresholds, corrected)

    def line(label: str, case: tuple, which: range) -> str:
        parts = [found[(*case, n)] for n in which]
        rows = [torch.cat(part.recall, dim=1) for part in parts]
        mean = torch.cat([x.mean(dim=1) for x in rows]).mean()
        low = torch.cat([x.quantile(0.05, dim=1) for x in rows]).mean()
        error = torch.cat([(part.error / part.norm).sqrt() for part in parts])
        density = sum(part.kept.sum() for part in parts) / sum(part.visible.sum() for part in parts)
        return f"| {label} | {density:.1%} | {mean:.2%} | {low:.2%} | {error.mean():.4f} | {error.max():.3f} |"

    for alpha in options.alphas:
        for even in (False, True):
            print(f"\nalpha {alpha} of the published score, {'even' if even else 'one threshold for all heads'}\n")
            print("| score | density | recall | its 5th percentile | error | worst head |\n|---|---|---|---|---|---|")
            for score in SCORES:
                for correct in (False, True):
                    case = ((alpha, even, score), correct)
                    if (*case, 0) in found:
                        label = f"{score}{', corrected' * correct}"
                        print(line(label, case, range(len(layers))), flush=True)
                        for n in range(len(layers)) if options.by_layer else ():
                            print(line(f"{numbers[n]}: {label}", case, range(n, n + 1)))


if __name__ == "__main__":
    with torch.no_grad():
        main()
