"""The four stages in plain PyTorch: pool, score, select, attend. This file defines what is correct.

Blocks are cut at absolute positions of the sequence, so a chunk that starts or ends on a block boundary
selects what one pass over the whole prompt selects. Shapes: T tokens of this chunk, S = context_len + T
tokens of the sequence so far, H query heads, G KV heads (query head h reads KV head h // (H // G)), D head
size, B block size, NQ query blocks that the chunk touches, NK = ceil(S / B) key blocks.

Source: FlashPrefill, arXiv 2603.06199.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.key_values import KeyValues, dequantise_queries, is_e4m3
from vllm_flashprefill.plan import StepPlan

# What probabilities, at most 1, are multiplied by before they become e4m3, whose numbers below 2**-6 have fewer bits.
P_SCALE = 256.0


def block_mean_ref(k: torch.Tensor, block_size: int) -> torch.Tensor:
    """Stage 1, pool: the mean key of each block; a last, partial block divides by its real length.

    Args:
        k: [S, G, D], keys of the whole sequence so far.

    Returns:
        [NK, G, D] in float32.
    """
    blocks = k.split(block_size)
    return torch.stack([block.float().mean(dim=0) for block in blocks])


def block_score_ref(
    q: torch.Tensor, k_mean: torch.Tensor, *, context_len: int, block_size: int, softmax_scale: float
) -> torch.Tensor:
    """Stage 2, score: how much of its attention a query block would give to each mean key.

    A row at position p scores the blocks whose last token is at most p. A query block's score of key block j
    is the sum over its rows of exp(s[row, j] - m), m being the largest s over all its rows and blocks.

    Args:
        q: [T, H, D], queries of this chunk.
        k_mean: [NK, G, D] in float32, from `block_mean_ref`.
        context_len: tokens of the sequence before this chunk.

    Returns:
        [H, NQ, NK] in float32; 0 where no row of the query block sees the whole key block.
    """
    num_tokens, num_heads, _ = q.shape
    num_key_blocks = k_mean.shape[0]
    seq_len = context_len + num_tokens
    keys = k_mean.repeat_interleave(num_heads // k_mean.shape[1], dim=1).permute(1, 2, 0)
    block_ends = torch.arange(1, num_key_blocks + 1, device=q.device) * block_size - 1
    block_ends.clamp_(max=seq_len - 1)

    scores = []
    for start, end in query_block_bounds(context_len, num_tokens, block_size):
        rows = q[start - context_len : end - context_len].float().transpose(0, 1)
        s = softmax_scale * (rows @ keys)
        positions = torch.arange(start, end, device=q.device)
        s = s.masked_fill(block_ends > positions[:, None], -torch.inf)
        largest = s.amax(dim=(1, 2), keepdim=True)
        scores.append(torch.exp(s - largest.clamp(min=torch.finfo(torch.float32).min)).sum(dim=1))
    return torch.stack(scores, dim=1)


def piece_score_ref(
    q: torch.Tensor, k: torch.Tensor, *, context_len: int, config: FlashPrefillConfig, softmax_scale: float
) -> torch.Tensor:
    """Stages 1 and 2 with pieces: how much of its attention a query block would give to the pieces of its candidates.

    Candidates are the key blocks before the query block's own whose sum over its rows of exp(s[row, block]), s with
    the block's mean key, is at least `candidate_alpha` of the largest one. A candidate's score is the largest over rows
    and over its pieces of exp(s[row, piece] - m[row]), s with the piece's mean key and m[row] the row's largest of all
    candidates' pieces.

    Args:
        q: [T, H, D], queries of this chunk. k: [S, G, D], keys of the whole sequence so far.
        context_len: tokens of the sequence before this chunk.

    Returns:
        [H, NQ, NK] in float32; 0 for a block that is no candidate.
    """
    num_tokens, num_heads, _ = q.shape
    num_pieces = config.num_pieces

    def mean_keys(size: int) -> torch.Tensor:
        return block_mean_ref(k, size).repeat_interleave(num_heads // k.shape[1], dim=1).permute(1, 2, 0)

    blocks, pieces = mean_keys(config.block_size), mean_keys(config.piece_size)
    scores = []
    for start, end in query_block_bounds(context_len, num_tokens, config.block_size):
        rows = q[start - context_len : end - context_len].float().transpose(0, 1)
        own = start // config.block_size
        score = q.new_zeros(num_heads, blocks.shape[2], dtype=torch.float32)
        if own:
            coarse = (softmax_scale * (rows @ blocks[:, :, :own])).logsumexp(dim=1)
            least = coarse.amax(dim=-1, keepdim=True) + (
                math.log(config.candidate_alpha) if config.candidate_alpha else -math.inf
            )
            s = (softmax_scale * (rows @ pieces[:, :, : own * num_pieces])).unflatten(2, (own, num_pieces))
            s = s.masked_fill((coarse < least)[:, None, :, None], -torch.inf)
            score[:, :own] = score_of_pieces_ref(s)
        scores.append(score)
    return torch.stack(scores, dim=1)


def score_of_pieces_ref(s: torch.Tensor) -> torch.Tensor:
    """The scores of blocks, [H, blocks], from the logits of rows with their pieces.

    Args:
        s: [H, R, blocks, pieces], -inf throughout a block that is no candidate; its score is 0.
    """
    return (s - s.amax(dim=(2, 3), keepdim=True)).amax(dim=(1, 3)).exp()


def block_select_ref(
    score: torch.Tensor, *, first_query_block: int, num_prompt_blocks: int, config: FlashPrefillConfig
) -> torch.Tensor:
    """Stage 3, select: which key blocks each query block attends to.

    Args:
        score: [H, NQ, NK], from `block_score_ref`, or with pieces from `piece_score_ref`.
        first_query_block: absolute index of the chunk's first query block.
        num_prompt_blocks: blocks of the whole prompt, whose last `num_dense_tail_blocks` keep everything.

    Returns:
        [H, NQ, NK] bool. A block after the query's own is never kept; the query's own always is.
    """
    _, num_query_blocks, num_key_blocks = score.shape
    i = torch.arange(first_query_block, first_query_block + num_query_blocks, device=score.device)[:, None]
    j = torch.arange(num_key_blocks, device=score.device)[None, :]
    always = (
        (j < config.num_sink_blocks)
        | (i - j < config.num_window_blocks)
        | (i >= num_prompt_blocks - config.num_dense_tail_blocks)
    )
    kept = score >= config.alpha * score.amax(dim=-1, keepdim=True)
    return (kept | always) & (j <= i)


def sparse_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    context_len: int,
    block_size: int,
    softmax_scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stage 4, attend: exact softmax attention over the kept blocks, causal inside the query's own.

    Args:
        q: [T, H, D]. k, v: [S, G, D].
        mask: [H, NQ, NK] bool, from `block_select_ref`.
        sinks: [H], a logit of each head that takes part in the softmax and has no value.

    Returns:
        [T, H, D] in q's dtype; logits, softmax and the sum over values are in float32.
    """
    num_tokens, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1).permute(1, 2, 0)
    values = v.float().repeat_interleave(group, dim=1).transpose(0, 1)
    out = torch.empty_like(q)
    for index, (start, end) in enumerate(query_block_bounds(context_len, num_tokens, block_size)):
        rows = q[start - context_len : end - context_len].float().transpose(0, 1)
        logits = softmax_scale * (rows @ keys[:, :, :end])
        kept = mask[:, index].repeat_interleave(block_size, dim=-1)[:, None, :end]
        positions = torch.arange(start, end, device=q.device)
        causal = torch.arange(end, device=q.device) <= positions[:, None]
        logits = logits.masked_fill(~(kept & causal), -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)], dim=-1)
        probabilities = logits.softmax(dim=-1)[..., :end]
        out[start - context_len : end - context_len] = (probabilities @ values[:, :end]).transpose(0, 1).to(q.dtype)
    return out


def sparse_attention_fp8_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    context_len: int,
    block_size: int,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stage 4 with products in e4m3: `sparse_attention_ref`, with what is rounded on the way.

    Queries, keys and values over their scales are rounded to e4m3, to its ends where they are beyond: that changes
    nothing of what e4m3 codes stand for. A query block takes in its own key block, then its kept ones from the first
    on. Of each, p = exp(logit - the row's largest logit so far) is summed as it is, and `P_SCALE` * p is rounded to
    e4m3 for its product with the values. Products are summed in float32.

    Args:
        q, k, v, mask, context_len, sinks: as of `sparse_attention_ref`.
        q_scale, k_scale, v_scale: as of `KeyValues`; q_scale likewise, for the heads of each KV head.

    Returns:
        [T, H, D] in q's dtype.

    Source: FlashAttention-3 (arXiv 2407.08608), whose forward in e4m3 scales probabilities by 2**8 likewise.
    """
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, seq_len = k.shape[1], k.shape[0]

    def coded(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, tokens, D], what the codes alone stand for, and their scale by head, [H, 1, 1]."""
        scale = torch.ones(1, device=x.device) if scale is None else scale
        by_head = scale.expand(num_kv_heads).repeat_interleave(num_heads // num_kv_heads).view(-1, 1, 1)
        x = x.float().transpose(0, 1).repeat_interleave(num_heads // x.shape[1], dim=0)
        return _rounded_to_e4m3(x / by_head), by_head

    (queries, q_scale), (keys, k_scale), (values, v_scale) = coded(q, q_scale), coded(k, k_scale), coded(v, v_scale)
    out = torch.empty_like(q)
    for index, (start, end) in enumerate(query_block_bounds(context_len, num_tokens, block_size)):
        rows = queries[:, start - context_len : end - context_len]
        positions = torch.arange(start, end, device=q.device)[:, None]
        own = start // block_size
        largest, total, acc = rows.new_full((*rows.shape[:2], 1), -torch.inf), 0.0, 0.0
        for block in (own, *range(own)):
            tokens = torch.arange(block * block_size, min((block + 1) * block_size, seq_len), device=q.device)
            logits = (rows @ keys[:, tokens].transpose(1, 2)) * (softmax_scale * q_scale * k_scale)
            seen = mask[:, index, block].view(-1, 1, 1) & (tokens <= positions)
            logits = logits.masked_fill(~seen, -torch.inf)
            new_largest = torch.maximum(largest, logits.amax(dim=2, keepdim=True))
            p, correction = (logits - new_largest).exp(), (largest - new_largest).exp()
            total = total * correction + p.sum(dim=2, keepdim=True)
            acc = acc * correction + _rounded_to_e4m3(P_SCALE * p) @ values[:, tokens]
            largest = new_largest
        if sinks is not None:
            total = total + (sinks.float().view(-1, 1, 1) - largest).exp()
        attended = acc / total * (v_scale / P_SCALE)
        out[start - context_len : end - context_len] = attended.transpose(0, 1).to(q.dtype)
    return out


def _rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest of e4m3, beyond its range to its ends, in float32."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def query_block_bounds(context_len: int, num_tokens: int, block_size: int) -> list[tuple[int, int]]:
    """[start, end) absolute token positions of each query block's rows that lie in this chunk."""
    seq_len = context_len + num_tokens
    first = context_len // block_size
    last = (seq_len - 1) // block_size
    return [(max(context_len, i * block_size), min(seq_len, (i + 1) * block_size)) for i in range(first, last + 1)]


def select_blocks_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    context_len: int,
    prompt_len: int,
    config: FlashPrefillConfig,
    softmax_scale: float,
) -> torch.Tensor:
    """Stages 1 to 3 for one sequence.

    Args:
        q: [T, H, D], queries of this chunk. k: [S, G, D], keys of the whole sequence so far.
        prompt_len: tokens of the whole prompt, later chunks included.

    Returns:
        [H, NQ, NK] bool.
    """
    block_size = config.block_size
    if config.piece_size:
        score = piece_score_ref(q, k, context_len=context_len, config=config, softmax_scale=softmax_scale)
    else:
        k_mean = block_mean_ref(k, block_size)
        score = block_score_ref(q, k_mean, context_len=context_len, block_size=block_size, softmax_scale=softmax_scale)
    return block_select_ref(
        score,
        first_query_block=context_len // block_size,
        num_prompt_blocks=-(-prompt_len // block_size),
        config=config,
    )


def flash_prefill_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    prompt_len: int | None = None,
    sinks: torch.Tensor | None = None,
    block_counts: torch.Tensor | None = None,
    attend: Callable[..., torch.Tensor] = sparse_attention_ref,
) -> torch.Tensor:
    """All four stages for one sequence whose last T tokens are this chunk.

    Args:
        q: [T, H, D]. k, v: [S, G, D], S >= T.
        prompt_len: tokens of the whole prompt; S if the chunk ends it.
        sinks: as of `sparse_attention_ref`.
        block_counts: [2] int64; the key blocks kept, and those visible, of all query blocks and heads are added.
        attend: stage 4.

    Returns:
        [T, H, D] in q's dtype.
    """
    context_len = k.shape[0] - q.shape[0]
    mask = select_blocks_ref(
        q,
        k,
        context_len=context_len,
        prompt_len=prompt_len or k.shape[0],
        config=config,
        softmax_scale=softmax_scale,
    )
    if block_counts is not None:
        first, num_query_blocks = context_len // config.block_size, mask.shape[1]
        visible = len(mask) * sum(range(first + 1, first + num_query_blocks + 1))
        block_counts += block_counts.new_tensor([int(mask.sum()), visible])
    return attend(
        q, k, v, mask, context_len=context_len, block_size=config.block_size, softmax_scale=softmax_scale, sinks=sinks
    )


def flash_prefill_paged_ref(
    q: torch.Tensor,
    kv: KeyValues,
    plan: StepPlan,
    *,
    config: FlashPrefillConfig,
    softmax_scale: float,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    block_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """All four stages for the sparse requests of a step, whose keys and values are all in the cache.

    Args:
        q: [tokens of the step, H, D]; float8_e4m3fn, too.
        kv: the cache in pages, of any size and strides.
        plan: which requests are sparse.
        q_scale, sinks: as of `api.flash_prefill_paged`.
        out: [tokens of the step, H, D]; rows of other requests are left alone.
        block_counts: [2] int64; the key blocks kept, and those visible, of all query blocks and heads are added.

    Returns:
        out.
    """
    attend = sparse_attention_ref
    if config.compute_dtype == "fp8":
        scales = dict(q_scale=q_scale, k_scale=kv.k_scale, v_scale=kv.v_scale)
        attend = functools.partial(sparse_attention_fp8_ref, **scales)
    if is_e4m3(q):
        q = dequantise_queries(q, q_scale, kv.num_heads)
    for request in plan.sparse:
        out[request.query_slice] = flash_prefill_ref(
            q[request.query_slice],
            *kv.of_request(request),
            config=config,
            softmax_scale=softmax_scale,
            prompt_len=request.prompt_len,
            sinks=sinks,
            block_counts=block_counts,
            attend=attend,
        )
    return out
