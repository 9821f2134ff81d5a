"""Stage 4 on the CPU, batched: the same result as `sparse_attention_ref`, on PyTorch's flash attention."""

from __future__ import annotations

import torch

from vllm_flashprefill.cpu.blocks import in_blocks

# Keys and values gathered for one call of PyTorch's attention take at most this many bytes.
GATHER_BYTES = 64 << 20


def sparse_attention_cpu(
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
    """Exact softmax attention over the kept blocks; arguments and result as of `sparse_attention_ref`.

    A query block's own key block is attended causally and its earlier ones, which its rows see whole, without a
    mask, so neither needs one; the two are joined by their log-sum-exp. Query blocks that keep equally many
    blocks go in one call.
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads = k.shape[1]
    _, num_query_blocks, num_key_blocks = mask.shape
    first = context_len // block_size
    lead = context_len - first * block_size
    kv_head = torch.arange(num_heads) // (num_heads // num_kv_heads)

    # [H, NQ, B, D] and [G, NK, B, D]; rows outside the chunk are zeros that nothing reads.
    q_blocks = in_blocks(q, lead, num_query_blocks, block_size)
    k_blocks = in_blocks(k, 0, num_key_blocks, block_size)
    v_blocks = in_blocks(v, 0, num_key_blocks, block_size)

    own = slice(first, first + num_query_blocks)
    out, lse = _flash(
        q_blocks.flatten(0, 1),
        k_blocks[:, own][kv_head].flatten(0, 1),
        v_blocks[:, own][kv_head].flatten(0, 1),
        softmax_scale,
        is_causal=True,
    )
    out = out.float().view(num_heads, num_query_blocks, block_size, head_size)
    lse = lse.view(num_heads, num_query_blocks, block_size, 1)

    earlier = mask.clone()
    earlier[:, torch.arange(num_query_blocks), torch.arange(own.start, own.stop)] = False
    counts = earlier.sum(dim=-1)
    block_bytes = 2 * block_size * head_size * k.element_size()
    for count in counts.unique().tolist():
        if count == 0:
            continue
        heads, blocks = (counts == count).nonzero(as_tuple=True)
        kept = earlier[heads, blocks].nonzero()[:, 1].view(-1, count)
        at_once = max(1, GATHER_BYTES // (count * block_bytes))
        for some in torch.arange(len(heads)).split(at_once):
            h, i = heads[some], blocks[some]
            at = (kv_head[h][:, None], kept[some])
            part, part_lse = _flash(
                q_blocks[h, i], k_blocks[at].flatten(1, 2), v_blocks[at].flatten(1, 2), softmax_scale
            )
            part_lse = part_lse.unsqueeze(-1)
            joined = torch.logaddexp(lse[h, i], part_lse)
            out[h, i] = out[h, i] * (lse[h, i] - joined).exp() + part * (part_lse - joined).exp()
            lse[h, i] = joined
    if sinks is not None:
        out *= (lse - sinks.float().view(-1, 1, 1, 1)).sigmoid()
    return out.flatten(1, 2)[:, lead : lead + num_tokens].transpose(0, 1).to(q.dtype)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [N, rows, D] queries over [N, tokens, D], and its [N, rows] log-sum-exp in float32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 0.0, is_causal, scale=softmax_scale
    )
    return out.squeeze(1), lse.float().reshape(q.shape[:2])
