"""Random batches, each made again from its seed."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from tests.support.request import Request
from tests.support.vllm_side import MAX_TOKENS, Shape
from vllm_flashprefill.config import FlashPrefillConfig

# Compiled into the kernels, so the same for all batches.
KEPT = {"num_sink_blocks": 0, "num_window_blocks": 1, "min_append_tokens": 0}
EDGES = (1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 384, 385, 511, 512, 513, 640)
KINDS = {
    "decode": 0.18,
    "drafts": 0.12,
    "last few": 0.05,
    "short": 0.1,
    "whole": 0.2,
    "first chunk": 0.08,
    "chunk": 0.08,
    "last chunk": 0.09,
    "prefix hit": 0.1,
}


@dataclass
class Batch:
    """A step; `random_batch(seed, page_size)` makes it again.

    Attributes:
        said: what the builder learns of prompts: their "lengths", "which" requests prefill, or "nothing".
    """

    seed: int
    page_size: int
    requests: list[Request]
    padding: int
    heads_first: bool
    fused_qkv: bool
    full_graphs: bool
    alpha: float
    num_dense_tail_blocks: int
    min_sparse_tokens: int
    said: str = "lengths"

    def config(self, alpha):
        options = {name: getattr(self, name) for name in ("num_dense_tail_blocks", "min_sparse_tokens")}
        # Many batches go through one layer, and each is to be sparse.
        return FlashPrefillConfig(alpha=alpha, max_density=1.0, **KEPT, **options)


def random_batch(seed, page_size, longest=6000):
    """Mostly up to 700 tokens a request, with a tail up to the longest; at most MAX_TOKENS of all requests."""
    rng = np.random.default_rng(seed)

    def length(most=longest):
        kind = rng.random()
        if kind < 0.2:
            tokens = rng.choice(EDGES)
        elif kind < 0.9:
            tokens = rng.integers(1, 701)
        else:
            tokens = rng.integers(701, 2001) if kind < 0.97 else rng.integers(2001, 6001)
        return min(int(tokens), most)

    def request(kind):
        new = functools.partial(Request, kind=kind)
        match kind:
            case "decode":
                return new(1, length())
            case "drafts":
                drafts = int(rng.integers(1, 8))
                return new(1 + drafts, length(), -drafts, refused=int(rng.choice([0, 1, drafts])))
            case "last few":
                return new(int(rng.integers(2, 9)), length())
            case "short":
                return new(int(rng.integers(1, 128)))
            case "first chunk":
                return new(length(), 0, length())
            case "chunk":
                return new(length(), length(), length())
            case "last chunk":
                return new(length(), length())
            case "prefix hit" if any(r.seq_len >= page_size for r in requests):
                row = int(rng.choice([n for n, r in enumerate(requests) if r.seq_len >= page_size]))
                pages = int(rng.integers(1, requests[row].seq_len // page_size + 1))
                own = int(rng.choice([0, 0, 1, 100]))
                rest = int(rng.choice([0, 0, 300]))
                return new(length(), pages * page_size + own, rest, shares=(row, pages))
        return Request(length(), kind="whole")

    requests = []
    for kind in rng.choice(list(KINDS), size=rng.integers(1, 7), p=list(KINDS.values())):
        drawn = request(str(kind))
        if sum(r.seq_len for r in [*requests, drawn]) <= MAX_TOKENS:
            requests.append(drawn)
    return Batch(
        seed,
        page_size,
        requests or [Request(400, kind="whole")],
        padding=int(rng.integers(0, 10)),
        heads_first=bool(rng.random() < 0.3),
        fused_qkv=bool(rng.random() < 0.5),
        full_graphs=bool(rng.random() < 0.5),
        alpha=float(rng.choice([0.1, 0.3, 0.6, 1.0])),
        num_dense_tail_blocks=int(rng.choice([0, 1, 2])),
        min_sparse_tokens=int(rng.choice([1, 100, 250, 400])),
        said=str(rng.choice(["lengths", "which", "nothing"], p=[0.6, 0.2, 0.2])),
    )


def spread(shapes, num_batches):
    """[(shape, its seeds)], with every batch another seed."""
    return [(shape, range(n, num_batches, len(shapes))) for n, shape in enumerate(shapes)]


def shapes(heads, head_sizes, dtypes, page_sizes, kv_cache_dtype="auto"):
    return [
        Shape(*counts, head_size, dtype, page_size, kv_cache_dtype)
        for counts, head_size, dtype, page_size in itertools.product(heads, head_sizes, dtypes, page_sizes)
    ]
