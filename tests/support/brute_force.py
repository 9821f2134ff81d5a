"""Attention token by token in float64, written without a block in sight: what the reference is held against."""

import torch


def dense(q, k, v, *, softmax_scale):
    """Causal attention of the last T of S tokens. q: [T, H, D]; k, v: [S, G, D]. Returns [T, H, D] float64."""
    return masked(q, k, v, token_mask=None, softmax_scale=softmax_scale)


def masked(q, k, v, *, token_mask, softmax_scale):
    """As `dense`, with the keys that token_mask [H, T, S] leaves."""
    num_tokens, num_heads, _ = q.shape
    seq_len, num_kv_heads, _ = k.shape
    context_len = seq_len - num_tokens
    out = torch.empty(q.shape, dtype=torch.float64)
    for h in range(num_heads):
        kv_head = h // (num_heads // num_kv_heads)
        logits = softmax_scale * (q[:, h].double() @ k[:, kv_head].double().T)
        hidden = torch.ones(num_tokens, seq_len, dtype=torch.bool).triu(context_len + 1)
        if token_mask is not None:
            hidden |= ~token_mask[h]
        out[:, h] = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v[:, kv_head].double()
    return out


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()
