"""Time the kernels beside dense attention at published densities; append a row a case to a CSV.

    python -m benchmarks.bench_kernels                  the table: 4K to 256K tokens, 32/8 heads of 128
    python -m benchmarks.bench_kernels --cases shapes   other heads and head sizes, ragged batches, chunks, pages
    python -m benchmarks.bench_kernels --piece-size 0   blocks chosen by the published score
    python -m benchmarks.bench_kernels --kinds bf16 e4m3 e4m3-fp8    e4m3 caches beside it, and products in e4m3 too

Each row is checked first, on the inputs it is timed on: query blocks of every kind against float64 over the blocks
the kernel kept, and the kept blocks against the reference's scores. A row whose check fails has no speedup.

All kinds of a case have the same inputs, those of e4m3 rounded to it with a scale of 1, queries too, as vLLM hands
them; its blocks are chosen by the codes, for the same density. Their output is in float16, in which a sharper check is
possible than in bfloat16. Dense attention is in bfloat16 and is timed once a case. Values that are transposed for
products in e4m3 are so with the pooling: `pool_ms` has that time, `attend_ms` has not.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from benchmarks.kernel_data import DENSITY, structured_qkv
from tools.rows import RESULTS, append_row, commit_name
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels.block_mean import block_mean
from vllm_flashprefill.kernels.block_select import block_select, score_scratch
from vllm_flashprefill.kernels.configs import num_multiprocessors
from vllm_flashprefill.kernels.parts import join_parts, part_scratch
from vllm_flashprefill.kernels.pipeline import list_scratch, run_stages
from vllm_flashprefill.kernels.schedule import schedule_step
from vllm_flashprefill.kernels.sparse_attention import sparse_attention, takes_fp8_products
from vllm_flashprefill.kernels.value_tiles import value_tiles
from vllm_flashprefill.key_values import KeyValues, is_e4m3
from vllm_flashprefill.plan import SparseRequest, StepPlan
from vllm_flashprefill.reference import score_of_pieces_ref, sparse_attention_fp8_ref

# (dtype of keys and values, `compute_dtype`)
KINDS = {"bf16": ("bf16", "auto"), "e4m3": ("e4m3", "auto"), "e4m3-fp8": ("e4m3", "fp8")}

TIE = 0.01
# The largest error allowed: over that of plain PyTorch; of products in e4m3, over that of their reference. It is some
# 1.7 % of the output, which less than LEAST_FP8_ERROR of it would not be: another kernel must have run.
MOST_ERROR, MOST_FP8_ERROR, LEAST_FP8_ERROR = 2.0, 1.15, 0.5
# Blocks that the published score leaves for the pieces to choose from, over those kept: 41 and 17 % of the blocks of
# 32,000 tokens of Qwen2.5-Coder-1.5B.
CANDIDATES = 2.4


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one row.

    Attributes:
        lengths: tokens of each packed prompt.
        query_len: only this many last tokens of the one prompt are queries, the rest being their prefix; 0: all.
        density: share of causal blocks to prune to.
        page_size: keys and values in shuffled pages of this many tokens; 0: plain.
        dense: time dense attention too.
    """

    lengths: tuple[int, ...]
    density: float
    query_len: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    page_size: int = 0
    dense: bool = True


TABLE = [Case((tokens,), density) for tokens, density in DENSITY.items()]
RAGGED = (1000, 30_000, 4097, 8192, 20_000, 513, 12_345, 16_384)
SHAPES = [
    Case((32768,), DENSITY[32768], heads=28, kv_heads=4),
    Case((32768,), DENSITY[32768], heads=32, kv_heads=4),
    Case((32768,), DENSITY[32768], head_size=64),
    Case((32768,), DENSITY[32768], head_size=256),
    Case(RAGGED, DENSITY[32768]),
    Case((131072,), DENSITY[131072], query_len=8192, dense=False),
    Case((131072,), DENSITY[131072], query_len=8192, page_size=128, dense=False),
    Case((131072,), DENSITY[131072], page_size=128, dense=False),
    Case((131072,), DENSITY[131072], page_size=16, dense=False),
]


class Stages:
    """The stages on fixed inputs, each callable alone."""

    def __init__(
        self,
        q,
        k,
        v,
        page_size: int = 0,
        query_len: int = 0,
        lengths: tuple[int, ...] = (),
        piece_size: int = 8,
        beside: bool = False,
        kv_dtype: str = "bf16",
        compute_dtype: str = "auto",
    ):
        total, self.device = k.shape[1], k.device
        if kv_dtype == "e4m3":
            q, k, v = (e4m3_codes(x) for x in (q, k, v))
        self.q, self.kv = q, KeyValues(k, v)
        if query_len:
            self.q = q[:, -query_len:]
        self.numbers = [numbers(x) for x in (self.q, k, v)]
        if page_size:
            pages = -(-total // page_size)
            order = torch.randperm(pages, device=self.device, dtype=torch.int32)
            if beside:
                heads, head_size = k.shape[2:]
                cache = torch.empty(pages, page_size, heads, 2 * head_size, device=self.device, dtype=k.dtype)
                cache = cache.split(head_size, dim=-1)
            else:
                cache = torch.empty(2, pages, page_size, *k.shape[2:], device=self.device, dtype=k.dtype)
            for n, x in enumerate((k, v)):
                cache[n][order.long()] = x[0].view(pages, page_size, *k.shape[2:])
            self.kv = KeyValues(cache[0], cache[1], order[None].contiguous())
        tokens = self.q.shape[1]
        starts = itertools.accumulate(lengths, initial=0)
        self.requests = tuple(
            SparseRequest(0, start, length, 0, length, kv_start=start)
            for length, start in zip(lengths, starts, strict=False)
        ) or (SparseRequest(0, 0, tokens, total - tokens, total),)
        self.plan = StepPlan(self.requests)
        self.heads, self.scale = q.shape[2], q.shape[3] ** -0.5
        self.config = FlashPrefillConfig(piece_size=piece_size, compute_dtype=compute_dtype)
        self.schedule = self.make_schedule()
        self.mean = block_mean(self.kv, self.schedule)
        self.pieces = None
        if piece_size:
            groups, rows, head_size = self.mean.shape
            self.pieces = self.mean.new_empty(groups, rows, self.config.num_pieces, head_size)
        self.value_tiles = None
        if compute_dtype == "fp8":
            if not takes_fp8_products(self.q, self.kv):
                raise RuntimeError("this GPU and Triton have no kernel that multiplies these in e4m3")
            self.value_tiles = self.mean.new_empty(*self.mean.shape, self.config.block_size, dtype=torch.uint8)
        self.pool()
        self.lists, self.counts = list_scratch(self.q, self.schedule)
        self.parts, self.counters = part_scratch(self.q, self.schedule), None
        self.scores = score_scratch(self.q, self.schedule, piece_size > 0)
        self.out = torch.empty_like(self.numbers[0])

    def make_schedule(self):
        return schedule_step(
            self.plan,
            num_heads=self.heads,
            num_dense_tail_blocks=self.config.num_dense_tail_blocks,
            device=self.q.device,
        )

    def pool(self):
        """What is done to keys and values before any block is chosen."""
        block_mean(self.kv, self.schedule, self.mean, self.pieces)
        if self.value_tiles is not None:
            value_tiles(self.kv, self.schedule, self.value_tiles)

    def select(self, launch=None, slab=None):
        scores = self.scores
        if launch:
            rows = launch.programs_per_sm * num_multiprocessors(self.q.device)
            scores = torch.empty(rows, self.schedule.max_key_blocks, device=self.device)
        block_select(
            self.q, self.mean, self.schedule, slab or self.schedule.slabs[0], pieces=self.pieces, config=self.config,
            softmax_scale=self.scale, lists=self.lists, counts=self.counts, parts=self.parts, scores=scores,
            launch=launch,
        )  # fmt: skip
        # Each selection counts its parts from 0, `all` too, and joining them leaves 0.
        if self.parts:
            self.counters = self.schedule.counters.clone()
            self.schedule.counters.zero_()

    def attend(self, launch=None, slab=None):
        slab = slab or self.schedule.slabs[0]
        if self.parts:
            self.schedule.counters.copy_(self.counters)
        sparse_attention(
            self.q, self.kv, self.schedule, slab, lists=self.lists, counts=self.counts, parts=self.parts,
            softmax_scale=self.scale, out=self.out, value_tiles=self.value_tiles, launch=launch,
        )  # fmt: skip
        if slab.part_tiles:
            join_parts(self.parts, self.schedule, slab, counts=self.counts, out=self.out)

    def all(self):
        """What a caller of the API pays."""
        run_stages(self.q, self.kv, self.make_schedule(), config=self.config, softmax_scale=self.scale, out=self.out)

    def kept_blocks(self) -> int:
        kept = 0
        for slab in self.schedule.slabs:
            self.select(slab=slab)
            kept += int(self.counts[: slab.num_items * self.heads].sum())
        return kept

    def density(self) -> float:
        visible = int((self.schedule.items[:, 1] + 1).sum()) * self.heads
        return self.kept_blocks() / visible

    def reference_score(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A whole query block's scores of the blocks before it, the largest, and which are within rounding of 0 or not.

        Args:
            q: [128, D]. k: [tokens, D] of the same head, up to the query block's own last.
        """
        blocks = k.float().unflatten(0, (-1, 128))
        if not self.config.piece_size:
            s = self.scale * q.float() @ blocks.mean(1).T
            s[:-1, -1] = -torch.inf
            score = torch.exp(s - s.max()).sum(0)
            return score[:-1], score.max(), torch.zeros(len(score) - 1, dtype=torch.bool, device=q.device)
        rows = self.scale * q.float()
        coarse = (rows @ blocks[:-1].mean(1).T).logsumexp(0)
        above = (
            coarse
            - coarse.max()
            - (math.log(self.config.candidate_alpha) if self.config.candidate_alpha else -math.inf)
        )
        pieces = rows @ blocks[:-1].unflatten(1, (-1, self.config.piece_size)).mean(2).flatten(0, 1).T
        pieces = pieces.unflatten(1, (len(coarse), -1)).masked_fill((above < 0)[:, None], -torch.inf)
        score = score_of_pieces_ref(pieces[None])[0]
        return score, score.max(), above.abs() < TIE

    def usual(self, q, k, v, p, context_len: int) -> torch.Tensor:
        """What may err as the kernel does: plain PyTorch in the inputs' precision, or products in e4m3.

        Args:
            q: [rows, D]. k, v: [tokens, D] of the kept blocks. p: [rows, tokens] float64, exact.
            context_len: tokens of the kept blocks before the first row.
        """
        if self.config.compute_dtype != "fp8":
            return p.to(q.dtype) @ v
        kept = torch.ones(1, 1, -(-len(k) // 128), dtype=torch.bool, device=q.device)
        rows, keys, values = (x.float()[:, None] for x in (q, k, v))
        how = dict(context_len=context_len, block_size=128, softmax_scale=self.scale)
        return sparse_attention_fp8_ref(rows, keys, values, kept, **how)[:, 0]

    def check(self) -> tuple[float, int, int]:
        """(largest error over `usual`'s, selections at the threshold, selections looked at); raises if wrong."""
        self.out.fill_(torch.nan)
        self.all()
        assert not self.out.isnan().any()
        group = self.heads // self.kv.num_heads
        ratio, ties, seen = 0.0, 0, 0
        generator = torch.Generator().manual_seed(1)
        for slab in self.schedule.slabs:
            self.select(slab=slab)
            counts = self.counts[: slab.num_items * self.heads].view(-1, self.heads).cpu()
            for n in [0, *torch.randint(slab.num_items, (6,), generator=generator).tolist()]:
                row, block, slot = self.schedule.items[slab.first_item + n].tolist()
                request = self.requests[row]
                seq_len, context_len = request.seq_len, request.context_len
                k, v = (x[0, request.kv_start :][:seq_len] for x in self.numbers[1:])
                first = max(block * 128, context_len)
                last = min(block * 128 + 128, seq_len)
                at = request.query_start - context_len
                rows = slice(at + first, at + last)
                for h in torch.randint(self.heads, (3,), generator=generator).tolist():
                    start = slot * self.heads + h * (block + 1)
                    kept = self.lists[start : start + counts[n, h]].long()
                    tokens = (kept[:, None] * 128 + torch.arange(128, device=self.device)).flatten()
                    tokens = tokens[tokens < seq_len]
                    q = self.numbers[0][0, rows, h]
                    keys, values = k[tokens, h // group], v[tokens, h // group]
                    causal = tokens[None] <= torch.arange(first, last, device=self.device)[:, None]
                    logits = (q.double() @ keys.double().T * self.scale).masked_fill(~causal, -torch.inf)
                    p = logits.softmax(-1)
                    exact = p @ values.double()
                    # The query's own block is the last of those kept.
                    usual = self.usual(q, keys, values, p, (len(kept) - 1) * 128 + first - block * 128)
                    error, usual_error = ((x.double() - exact).norm().item() for x in (self.out[0, rows, h], usual))
                    ratio = max(ratio, error / usual_error)
                    # The kept blocks, against the reference's score of all but the query's own block.
                    tail = -(-seq_len // 128) - self.config.num_dense_tail_blocks
                    if block < 1 or block >= tail or last - first < 128:
                        continue
                    score, most, unsure = self.reference_score(q, k[: (block + 1) * 128, h // group])
                    j = torch.arange(block, device=self.device)
                    always = (j < self.config.num_sink_blocks) | (block - j < self.config.num_window_blocks)
                    expected = (score >= self.config.alpha * most) | always
                    got = torch.zeros(block + 1, dtype=torch.bool, device=self.device)
                    got[kept] = True
                    differs = expected != got[:block]
                    near = unsure | ((score - self.config.alpha * most).abs() <= TIE * self.config.alpha * most)
                    assert not (differs & ~near).any(), "a selection differs that is not at the threshold"
                    ties, seen = ties + int(differs.sum()), seen + block
        if self.config.compute_dtype == "fp8":
            assert ratio <= MOST_FP8_ERROR, f"error {ratio:.2f} times that of the reference of products in e4m3"
            assert ratio >= LEAST_FP8_ERROR, f"error {ratio:.2f} times that of products in e4m3, which these cannot be"
        else:
            assert ratio <= MOST_ERROR, f"error {ratio:.2f} times plain PyTorch's"
        return ratio, ties, seen


def e4m3_codes(x: torch.Tensor) -> torch.Tensor:
    """x in e4m3 as uint8, beyond its range its ends."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def numbers(x: torch.Tensor) -> torch.Tensor:
    """x; what e4m3 codes stand for in float16, which holds each of them exactly."""
    return x.view(torch.float8_e4m3fn).half() if is_e4m3(x) else x


def alpha_for_density(stages: Stages, density: float) -> None:
    """Set the largest alpha found whose density is at least `density`, and with pieces as many candidates as usual."""
    if stages.config.piece_size:
        # With the least alpha all candidates are kept.
        stages.config = dataclasses.replace(stages.config, alpha=1e-30)
        _halve(stages, "candidate_alpha", min(1.0, CANDIDATES * density))
    _halve(stages, "alpha", density)


def _halve(stages: Stages, option: str, density: float) -> None:
    def is_enough(config: FlashPrefillConfig) -> bool:
        stages.config = config
        return stages.density() >= density

    stages.config = largest(stages.config, option, is_enough, 14)


def largest(
    config: FlashPrefillConfig, option: str, is_enough: Callable[[FlashPrefillConfig], bool], halvings: int
) -> FlashPrefillConfig:
    """The config with the largest value found in [0, 1] of an option with which it is enough."""
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(dataclasses.replace(config, **{option: middle})) else (low, middle)
    return dataclasses.replace(config, **{option: low})


def median_ms(call, rep: int = 200) -> float:
    call()
    torch.cuda.synchronize()
    return do_bench(call, warmup=rep // 5, rep=rep, return_mode="median")


def dense_ms(inputs: Sequence[torch.Tensor], lengths: tuple[int, ...], backend: SDPBackend, rep: int) -> float | None:
    """PyTorch's dense attention of the same prompts, one after another; None where the backend refuses."""
    prompts = list(zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in inputs), strict=True))

    def call():
        with sdpa_kernel(backend):
            for q, k, v in prompts:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        return median_ms(call, rep)
    except RuntimeError as error:
        print(f"{backend}: {error}")
        return None


def measure(case: Case, commit: str, kinds: Sequence[str], **options: Any) -> Iterator[dict]:
    """Check one case, time it, and return its row, for each kind. options: of `Stages`."""
    total = sum(case.lengths)
    inputs = structured_qkv(total, heads=case.heads, kv_heads=case.kv_heads, dim=case.head_size)
    lengths = case.lengths if len(case.lengths) > 1 else ()
    how = dict(page_size=case.page_size, query_len=case.query_len, **options)
    alphas: dict[str, dict[str, float]] = {}
    dense: dict[str, float | None] = {}
    for kv_dtype, compute_dtype in map(KINDS.get, kinds):
        stages = Stages(*inputs, lengths=lengths, kv_dtype=kv_dtype, compute_dtype=compute_dtype, **how)
        if kv_dtype in alphas:
            stages.config = dataclasses.replace(stages.config, **alphas[kv_dtype])
        else:
            alpha_for_density(stages, case.density)
            alphas[kv_dtype] = {name: getattr(stages.config, name) for name in ("alpha", "candidate_alpha")}
        density = stages.density()
        error, ties, seen = stages.check()
        sparse = median_ms(stages.all)
        pool = median_ms(stages.pool, 50)
        select = attend = 0.0
        for slab in stages.schedule.slabs:
            select += median_ms(functools.partial(stages.select, slab=slab), 50)
            attend += median_ms(functools.partial(stages.attend, slab=slab), 100)
        if case.dense and not dense:
            rep = 1 if total > 200_000 else 200
            for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                dense[name] = dense_ms(inputs, case.lengths, backend, rep)
        fa2, cudnn = dense.get("fa2"), dense.get("cudnn")
        yield dict(
            date=datetime.date.today().isoformat(),
            gpu=torch.cuda.get_device_name(),
            torch=torch.__version__,
            triton=triton.__version__,
            commit=commit,
            tokens=total,
            prompts=len(case.lengths),
            queries=case.query_len or total,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_size=case.head_size,
            dtype=kv_dtype,
            page_size=case.page_size,
            alpha=round(stages.config.alpha, 5),
            density=round(density, 5),
            check="passed",
            error_over_plain=round(error, 3),
            ties=f"{ties}/{seen}",
            sparse_ms=round(sparse, 4),
            pool_ms=round(pool, 4),
            select_ms=round(select, 4),
            attend_ms=round(attend, 4),
            attend_tflops=round(stages.kept_blocks() * 4 * 128 * 128 * case.head_size / attend / 1e9, 1),
            fa2_ms=fa2 and round(fa2, 4),
            cudnn_ms=cudnn and round(cudnn, 4),
            times_fa2=fa2 and round(fa2 / sparse, 2),
            times_cudnn=cudnn and round(cudnn / sparse, 2),
            piece_size=stages.config.piece_size,
            candidate_alpha=round(stages.config.candidate_alpha, 6) if stages.config.piece_size else "",
            kv_dtype=kv_dtype,
            compute_dtype=compute_dtype,
            piece_score="row" if stages.config.piece_size else "",
        )
        del stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=["table", "shapes"], default=["table"])
    parser.add_argument("--piece-size", type=int, default=FlashPrefillConfig.piece_size, help="(default: %(default)s)")
    parser.add_argument(
        "--beside",
        action="store_true",
        help="pages with a head's keys and values beside each other, as in vLLM 0.26.0 and newer; no row is written",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["bf16"],
        help="dtype of the cache; -fp8: its products in e4m3 too (default: bf16)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="only the cases of these total tokens")
    parser.add_argument("--commit", help="commit to name in the rows (default: $COMMIT, else git's)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "kernels.csv")
    args = parser.parse_args()
    commit = commit_name(args.commit)
    for case in [case for name in args.cases for case in {"table": TABLE, "shapes": SHAPES}[name]]:
        if args.tokens and sum(case.lengths) not in args.tokens:
            continue
        options = dict(piece_size=args.piece_size, beside=args.beside)
        for row in measure(case, commit, args.kinds, **options):
            if not args.beside:
                append_row(args.csv, row)
            print({key: row[key] for key in list(row)[5:]}, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
