"""Inputs and comparisons that the kernel tests share, on the GPU and under Triton's interpreter."""

import dataclasses
import math

import numpy as np
import torch
import triton
import triton.language as tl

from tests.support.request import paged, structured
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.kernels import columns, pipeline
from vllm_flashprefill.kernels.block_mean import MEAN_DTYPE, block_mean
from vllm_flashprefill.kernels.block_select import block_select
from vllm_flashprefill.kernels.fp8 import from_e4m3
from vllm_flashprefill.kernels.parts import part_scratch, split_list_ref
from vllm_flashprefill.kernels.schedule import Schedule, schedule_requests
from vllm_flashprefill.kernels.sparse_attention import sparse_attention
from vllm_flashprefill.kernels.value_tiles import value_tiles
from vllm_flashprefill.kernels.workspace import Workspace
from vllm_flashprefill.key_values import KeyValues, dequantise
from vllm_flashprefill.plan import SparseRequest, plan_step
from vllm_flashprefill.reference import (
    block_mean_ref,
    block_score_ref,
    block_select_ref,
    piece_score_ref,
    sparse_attention_fp8_ref,
)

# A score this close to the threshold, in relative terms, may fall on either side: the mean keys are float16.
TIE = 0.01


@dataclasses.dataclass
class Batch:
    """Requests packed for the paged kernels, and each one's plain tensors."""

    requests: list
    q: torch.Tensor  # [1, tokens, H, D]
    kv: KeyValues
    parts: list  # (q [T, H, D], k [S, G, D], v) of each request, what e4m3 stands for; k and v then in float32
    schedule: Schedule
    dtype: torch.dtype  # of the output
    q_scale: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


def make_batch(
    requests,
    *,
    page_size=0,
    heads=4,
    kv_heads=2,
    dim=64,
    dtype=torch.float16,
    kv_dtype=None,
    kv_scales="none",
    q_e4m3=False,
    sinks=False,
    heads_first=False,
    beside=False,
    fused_qkv=False,
    device="cpu",
    seed=0,
    config,
    slab_bytes=None,
    part_tiles=0,
):
    """kv_dtype: the e4m3 dtype of the cache, if it is one. kv_scales: its scales, "none", "one" or one a "head".
    q_e4m3: the queries are in e4m3 too, with scales likewise. heads_first: pages hold head after head. beside: a head's
    keys and values lie beside each other. fused_qkv: q is a part of the rows of one projection's output. part_tiles: of
    the parts that long lists are split into, None for what the schedule chooses."""
    device = torch.device(device)
    parts = [
        structured(
            r.query_len, r.seq_len, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device, seed=seed + n
        )
        for n, r in enumerate(requests)
    ]
    q_scale = None
    if q_e4m3:
        if kv_scales != "none":
            q_scale = torch.arange(1, (kv_heads if kv_scales == "head" else 1) + 1, device=device) / 64
        scale = q_scale if q_scale is None else q_scale.repeat_interleave(heads // len(q_scale))
        queries = [quantised(part[0], scale) for part in parts]
        parts = [(dequantise(x, scale).to(dtype), *part[1:]) for x, part in zip(queries, parts, strict=True)]
        q = torch.cat(queries)
    else:
        q = torch.cat([part[0] for part in parts])
    if fused_qkv:
        qkv = q.new_full((len(q), heads + 2 * kv_heads, dim), torch.nan)
        qkv[:, :heads] = q
        q = qkv[:, :heads]
    block_table, sparse, query_start, kv_start = None, [], 0, 0
    for row, request in enumerate(requests):
        lengths = request.query_len, request.context_len, request.prompt_len
        sparse.append(SparseRequest(row, query_start, *lengths, kv_start=kv_start))
        query_start += request.query_len
        kv_start += request.seq_len
    keys, values, scales = [part[1] for part in parts], [part[2] for part in parts], {}
    if kv_dtype is not None:
        if kv_scales != "none":
            steps = torch.arange(1, (kv_heads if kv_scales == "head" else 1) + 1, device=device)
            scales = {"k_scale": 0.05 * steps, "v_scale": 0.03 * steps}
        keys = [quantised(x, scales.get("k_scale")) for x in keys]
        values = [quantised(x, scales.get("v_scale")) for x in values]
        parts = [
            (part[0], dequantise(k, scales.get("k_scale")), dequantise(v, scales.get("v_scale")))
            for part, k, v in zip(parts, keys, values, strict=True)
        ]
    if page_size:
        k, block_table = paged(keys, page_size, seed=seed, heads_first=heads_first)
        v, _ = paged(values, page_size, seed=seed, heads_first=heads_first)
        if beside:
            cache = torch.cat([k, v], dim=-1)
            if heads_first:
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            k, v = cache.split(dim, dim=-1)
    else:
        k, v = torch.cat(keys)[None], torch.cat(values)[None]
    if kv_dtype is not None:
        k, v = k.view(kv_dtype), v.view(kv_dtype)
    extra = {} if slab_bytes is None else {"list_bytes": slab_bytes}
    schedule = schedule_requests(
        sparse, num_heads=heads, num_dense_tail_blocks=config.num_dense_tail_blocks, device=device,
        part_tiles=part_tiles, **extra,
    )  # fmt: skip
    return Batch(requests, q[None], KeyValues(k, v, block_table, **scales), parts, schedule, dtype, q_scale,
                 torch.linspace(-20, 20, heads, dtype=dtype, device=device) if sinks else None)  # fmt: skip


def planned_batch(requests, config, **options):
    """(a batch of `make_batch`, the plan of it)"""
    lens = [[getattr(r, name) for r in requests] for name in ("query_len", "seq_len", "prompt_len")]
    plan = plan_step(np.cumsum([0, *lens[0]]), np.array(lens[1]), config, np.array(lens[2]))
    return make_batch(requests, config=config, **options), plan


def quantised(x, scale):
    """e4m3 codes (uint8) of [S, G, D]."""
    scaled = x.float() if scale is None else x.float() / scale[:, None]
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def run_select(batch, config, scale):
    """Masks [H, NQ, NK] bool and log2 scores [H, NQ, NK] of each request, from the kernels, on NaN-filled scratch."""
    heads = batch.q.shape[2]
    schedule = batch.schedule
    pieces = None
    if config.piece_size:
        shape = (batch.kv.num_heads, schedule.num_mean_rows, config.num_pieces, batch.q.shape[3])
        pieces = torch.full(shape, torch.nan, dtype=MEAN_DTYPE, device=batch.q.device)
    mean = block_mean(batch.kv, schedule, pieces=pieces)
    masks = [
        torch.zeros(heads, -(-r.seq_len // 128) - r.context_len // 128, -(-r.seq_len // 128), dtype=torch.bool)
        for r in batch.requests
    ]
    scores = [torch.full(mask.shape, torch.nan) for mask in masks]
    items = schedule.items.tolist()
    for slab in schedule.slabs:
        lists, counts = pipeline.list_scratch(batch.q, schedule)
        lists.fill_(-1)
        scratch = torch.full((slab.num_items * heads, schedule.max_key_blocks), torch.nan, device=batch.q.device)
        parts = part_scratch(batch.q, schedule)
        chosen = dict(pieces=pieces, config=config, lists=lists, counts=counts, parts=parts, scores=scratch)
        block_select(batch.q, mean, schedule, slab, softmax_scale=scale, q_scale=batch.q_scale, **chosen)
        if slab.part_tiles:
            check_parts(parts, schedule, slab, counts[: slab.num_items * heads].tolist())
        lists, counts, scratch = lists.cpu(), counts.cpu(), scratch.cpu()
        for n in range(slab.num_items):
            row, block, slot = items[slab.first_item + n]
            at = block - batch.requests[row].context_len // 128
            for h in range(heads):
                start = slot * heads + h * (block + 1)
                kept = lists[start : start + counts[n * heads + h]]
                assert torch.equal(kept, kept.sort().values) and kept[-1] == block
                after = lists[start + len(kept) : start + block + 1]
                # With pieces, candidates lay there.
                assert pieces is not None or (after == -1).all(), "nothing is written after the list"
                masks[row][h, at, kept.long()] = True
                scores[row][h, at, : block + 1] = scratch[n * heads + h, : block + 1]
    return masks, scores


def check_parts(parts, schedule, slab, counts):
    """The parts of each list that is split are its tiles in order; lists stay whole that are short or find no room."""
    num_parts = int(schedule.counters[columns.NUM_PARTS])
    schedule.counters[columns.NUM_PARTS] = 0
    num_row_values = parts.max_parts * columns.PART_COLUMNS
    rows, firsts = parts.rows.cpu().tensor_split([num_row_values])
    rows = rows.view(-1, columns.PART_COLUMNS)[:num_parts].tolist()
    found = {}
    for number, (pair, first_tile, num_tiles) in enumerate(rows):
        if pair >= 0:
            found.setdefault(pair, []).append((number, first_tile, num_tiles))
    wanted = {pair for pair, count in enumerate(counts) if split_list_ref(count, slab.part_tiles)}
    assert found.keys() <= wanted and (found.keys() == wanted or num_parts > parts.max_parts)
    for pair, (count, first) in enumerate(zip(counts, firsts.tolist(), strict=False)):
        assert first == (found[pair][0][0] if pair in found else -1)
        if pair in found:
            numbers, *_ = zip(*found[pair], strict=True)
            assert numbers == tuple(range(first, first + len(numbers)))
            assert [row[1:] for row in found[pair]] == split_list_ref(count, slab.part_tiles)


def reference_select(request, part, config, scale):
    """E, its mask and which entries are within rounding of the threshold, from the reference."""
    q, k, _ = part
    arguments = dict(context_len=request.context_len, softmax_scale=scale)
    candidate_tie = torch.zeros(1, dtype=torch.bool, device=q.device)
    if config.piece_size:
        score, more, fewer = (
            piece_score_ref(q, k, config=dataclasses.replace(config, candidate_alpha=candidate_alpha), **arguments)
            for candidate_alpha in (min(1.0, config.candidate_alpha * near) for near in (1.0, 1 - TIE, 1 + TIE))
        )
        candidate_tie = (more > 0) != (fewer > 0)
    else:
        score = block_score_ref(q, block_mean_ref(k, 128), block_size=128, **arguments)
    mask = block_select_ref(
        score,
        first_query_block=request.context_len // 128,
        num_prompt_blocks=-(-request.prompt_len // 128),
        config=config,
    )
    threshold = config.alpha * score.amax(dim=-1, keepdim=True)
    return score.cpu(), mask.cpu(), (((score - threshold).abs() <= TIE * threshold) | candidate_tie).cpu()


def lists_of(masks, batch, slab):
    """What `block_select` would write for these masks."""
    heads = batch.q.shape[2]
    lists, counts = pipeline.list_scratch(batch.q, batch.schedule)
    lists, counts = lists.cpu().fill_(-1), counts.cpu()
    for n in range(slab.num_items):
        row, block, slot = batch.schedule.items[slab.first_item + n].tolist()
        at = block - batch.requests[row].context_len // 128
        for h in range(heads):
            kept = masks[row][h, at].nonzero().flatten()
            start = slot * heads + h * (block + 1)
            lists[start : start + len(kept)] = kept
            counts[n * heads + h] = len(kept)
    return lists.to(batch.q.device), counts.to(batch.q.device)


def run_attention(batch, masks, scale):
    """Stage 4 fed some masks, into a NaN-filled output; [T, H, D] of each request."""
    out = torch.full_like(batch.q, torch.nan, dtype=batch.dtype)
    for slab in batch.schedule.slabs:
        lists, counts = lists_of(masks, batch, slab)
        slab = dataclasses.replace(slab, part_tiles=0)
        sparse_attention(
            batch.q, batch.kv, batch.schedule, slab, lists=lists, counts=counts, softmax_scale=scale,
            q_scale=batch.q_scale, sinks=batch.sinks, out=out,
        )  # fmt: skip
    return split(out, batch)


def split(out, batch):
    return list(out[0].split([request.query_len for request in batch.requests]))


def check_means(batch):
    mean = block_mean(batch.kv, batch.schedule)
    expected = torch.cat([block_mean_ref(part[1], 128) for part in batch.parts]).transpose(0, 1)
    torch.testing.assert_close(mean.float(), expected, rtol=1e-3, atol=1e-3)


def check_select(batch, config, scale):
    """Scores and masks against the reference; returns (mismatches, entries)."""
    masks, scores = run_select(batch, config, scale)
    wrong = total = 0
    for request, part, mask, log2_score in zip(batch.requests, batch.parts, masks, scores, strict=True):
        score, expected, tie = reference_select(request, part, config, scale)
        # The kernel's scores have no common factor with the reference's: compare as shares of the largest.
        relative = score / score.amax(dim=-1, keepdim=True)
        found = torch.exp2(log2_score - log2_score.nan_to_num(-math.inf).amax(dim=-1, keepdim=True))
        scored = ~log2_score.isnan() & ~relative.isnan() & ~found.isnan()
        if config.piece_size:
            # Those under alpha may be left without a score.
            found = torch.where((found == 0) & (relative < config.alpha), relative, found)
        assert ((found - relative).abs() <= 0.01 * relative + 1e-6)[scored & ~tie].all()
        if config.alpha > 0:
            i = torch.arange(request.context_len // 128, -(-request.seq_len // 128))[:, None]
            must = (i >= config.num_sink_blocks + config.num_window_blocks) & (
                i < -(-request.prompt_len // 128) - config.num_dense_tail_blocks
            )
            visible = must & (torch.arange(mask.shape[2])[None] <= i)
            assert scored[:, visible].all(), "every block that is not kept anyway has a score"
        differs = mask != expected
        assert not (differs & ~tie).any(), "selections differ where the score is not at the threshold"
        wrong += int(differs.sum())
        total += mask.numel()
    assert wrong <= max(1, 0.002 * total), f"{wrong} of {total} selections fell to the other side of the threshold"
    return wrong, total


def check_attention(batch, config, scale):
    """Stage 4 on the reference's selection: error against float64 at most twice plain PyTorch's."""
    masks = [reference_select(r, part, config, scale)[1] for r, part in zip(batch.requests, batch.parts, strict=True)]
    for request, part, mask, out in zip(
        batch.requests, batch.parts, masks, run_attention(batch, masks, scale), strict=True
    ):
        assert_close_attention(out, part, mask, request, scale, batch.sinks)


def assert_close_attention(out, part, mask, request, scale, sinks=None):
    q, k, v = part
    exact, plain = exact_and_plain(q, k, v, mask.to(q.device), request.context_len, scale, sinks)
    error = ((out.double() - exact).norm() / exact.norm()).item()
    plain_error = ((plain.double() - exact).norm() / exact.norm()).item()
    assert error <= 2 * plain_error + 1e-6, f"error {error:.2e}, plain PyTorch's {plain_error:.2e}"


def exact_and_plain(q, k, v, mask, context_len, scale, sinks=None):
    """Attention over the kept blocks in float64, and in PyTorch with float32 logits and the probabilities in
    the inputs' precision, as fused kernels hold them. [T, H, D] each."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    q = q.transpose(0, 1)
    positions = torch.arange(context_len, context_len + q.shape[1], device=q.device)
    tokens = torch.arange(k.shape[1], device=q.device)
    allowed = mask[:, positions // 128 - context_len // 128].repeat_interleave(128, dim=-1)[:, :, : k.shape[1]]
    allowed = allowed & (tokens[None, :] <= positions[:, None])
    results = []
    for dtype in (torch.float64, q.dtype):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        logits = (q.to(wide) @ k.to(wide).transpose(1, 2)) * scale
        logits = logits.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(wide).view(-1, 1, 1).expand(-1, q.shape[1], 1)], dim=-1)
        p = logits.softmax(dim=-1)[..., : k.shape[1]]
        results.append((p.to(dtype) @ v.to(dtype)).transpose(0, 1))
    return results


def check_all(batch, config, scale):
    """Every stage, then all of them through the pipeline, on NaN-filled scratch, with its counts."""
    check_means(batch)
    check_select(batch, config, scale)
    check_attention(batch, config, scale)
    masks, _ = run_select(batch, config, scale)
    out = torch.full_like(batch.q, torch.nan, dtype=batch.dtype)
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    workspace = nan_workspace(out.device)
    marks = []
    for _ in range(2):
        pipeline.run_stages(
            batch.q, batch.kv, batch.schedule, config=config, softmax_scale=scale, q_scale=batch.q_scale,
            sinks=batch.sinks, out=out, block_counts=counts, workspace=workspace, mark=lambda: marks.append(None),
        )  # fmt: skip
    assert len(marks) == 2 * (1 + 2 * len(batch.schedule.slabs))
    assert not batch.schedule.counters.any(), "the counters are left as they were found"
    visible = sum(
        batch.q.shape[2] * (block + 1)
        for r in batch.requests
        for block in range(r.context_len // 128, -(-r.seq_len // 128))
    )
    assert counts.tolist() == [2 * sum(int(mask.sum()) for mask in masks), 2 * visible]
    for request, part, mask, got in zip(batch.requests, batch.parts, masks, split(out, batch), strict=True):
        assert_close_attention(got, part, mask, request, scale, batch.sinks)
    return out


def check_fp8_products(batch, config, scale):
    """All stages with products in e4m3: what they make of the kept blocks is as near to exact as the reference's, and
    nearer to the reference's than that is to exact."""
    masks, _ = run_select(batch, config, scale)
    out = torch.full_like(batch.q, torch.nan, dtype=batch.dtype)
    config = dataclasses.replace(config, compute_dtype="fp8")
    for _ in range(2):
        pipeline.run_stages(
            batch.q, batch.kv, batch.schedule, config=config, softmax_scale=scale, q_scale=batch.q_scale,
            sinks=batch.sinks, out=out, workspace=nan_workspace(out.device),
        )  # fmt: skip
    assert not batch.schedule.counters.any(), "the counters are left as they were found"
    for request, part, mask, got in zip(batch.requests, batch.parts, masks, split(out, batch), strict=True):
        mask = mask.to(out.device)
        expected = sparse_attention_fp8_ref(
            *part, mask, context_len=request.context_len, block_size=128, softmax_scale=scale, q_scale=batch.q_scale,
            k_scale=batch.kv.k_scale, v_scale=batch.kv.v_scale, sinks=batch.sinks,
        ).double()  # fmt: skip
        exact, _ = exact_and_plain(*part, mask, request.context_len, scale, batch.sinks)
        pairs = (expected, exact), (got.double(), exact), (got, expected)
        allowed, error, apart = (((a - b).norm() / exact.norm()).item() for a, b in pairs)
        # The one token of a sequence has its value, which is exact.
        assert (0.001 if request.seq_len > 1 else 0) <= allowed < 0.1, "the reference's error is e4m3's"
        assert error <= 1.1 * allowed + 1e-3, f"error {error:.2e}, the reference's {allowed:.2e}"
        assert apart <= allowed, f"{apart:.2e} from the reference, which is {allowed:.2e} from exact"


def check_value_tiles(batch):
    """Values of each block, transposed, in the order that a program's registers have probabilities in."""
    shape = batch.kv.num_heads, batch.schedule.num_mean_rows, batch.q.shape[3], 128
    tiles = value_tiles(batch.kv, batch.schedule, torch.full(shape, 255, dtype=torch.uint8, device=batch.q.device))
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    order = (16 * torch.arange(8)[:, None] + order).flatten()
    start = 0
    for row, request in enumerate(batch.requests):
        sparse = SparseRequest(
            row, 0, request.query_len, request.context_len, request.prompt_len,
            kv_start=int(batch.schedule.requests[row, columns.KV_START]),
        )  # fmt: skip
        _, v = batch.kv.of_request(sparse)
        plain = dataclasses.replace(batch.kv, v_scale=None).of_request(sparse)[1].to(torch.float8_e4m3fn)
        num_blocks = -(-len(v) // 128)
        padded = torch.zeros(num_blocks * 128, *v.shape[1:], dtype=torch.uint8, device=v.device)
        padded[: len(v)] = plain.view(torch.uint8)
        # [blocks, tokens, G, D] as [G, blocks, D, tokens]
        expected = padded.unflatten(0, (num_blocks, 128))[:, order.to(v.device)].permute(2, 0, 3, 1)
        assert torch.equal(tiles[:, start : start + num_blocks], expected)
        start += num_blocks


def check_nan_queries(batch, config, scale):
    """A row of queries that are not numbers: lists are in order, those of other query blocks as they were."""
    (before,), _ = run_select(batch, config, scale)
    batch.q[0, 900] = torch.nan
    (after,), _ = run_select(batch, config, scale)
    others = torch.arange(before.shape[1]) != 900 // 128
    assert torch.equal(after[:, others], before[:, others])


def nan_workspace(device, num_bytes=32 << 20):
    """A workspace in which every float is NaN and every integer -1."""
    workspace = Workspace(torch.device(device))
    workspace.reserve(num_bytes)
    workspace.empty((num_bytes,), torch.uint8).fill_(255)
    return workspace


def sparse_config(**options):
    defaults = dict(alpha=0.3, num_sink_blocks=1, num_window_blocks=2, num_dense_tail_blocks=1, piece_size=0)
    return FlashPrefillConfig(**defaults | options)


@triton.jit
def _read_e4m3_kernel(codes_ptr, out_ptr, NATIVE: tl.constexpr):
    offs = tl.arange(0, 256)
    tl.store(out_ptr + offs, from_e4m3(tl.load(codes_ptr + offs), NATIVE))


def check_e4m3_codes(device, *, native):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, dtype=torch.float16, device=device)
    _read_e4m3_kernel[(1,)](codes, out, native)
    torch.testing.assert_close(out, codes.view(torch.float8_e4m3fn).half(), rtol=0, atol=0, equal_nan=True)
