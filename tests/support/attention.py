"""Attention in plain PyTorch: what results are held against, and what stands in for vLLM's kernels on a CPU."""

import contextlib
import itertools
import math
from unittest import mock

import torch

from tests.support.e4m3 import to_e4m3
from vllm_flashprefill.key_values import codes


def exact_attention(q, k, v, scale, causal=True, most_logits=1 << 26, sinks=None):
    """Attention of the last tokens in float32, [T, H, D]. sinks: [H], a logit of each head that has no value."""
    num_tokens, num_heads, head_size = q.shape
    seq_len, kv_heads = k.shape[:2]
    k, v = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    at_once = max(1, most_logits // (num_heads * seq_len))
    position = torch.arange(seq_len, device=q.device)
    pieces = []
    for start in range(0, num_tokens, at_once):
        part = q[start : start + at_once].float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        group, rows = part.shape[1:3]
        logits = (torch.bmm(part.flatten(1, 2), k) * scale).view(kv_heads, group, rows, seq_len)
        last = seq_len - num_tokens + start + torch.arange(rows, device=q.device)
        if causal:
            logits.masked_fill_(position > last[:, None], -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, rows, 1)], dim=-1)
        p = logits.softmax(dim=-1)[..., :seq_len].contiguous()
        out = torch.bmm(p.view(kv_heads, group * rows, seq_len), v)
        pieces.append(out.view(kv_heads, group, rows, head_size).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(pieces)


def _write_cache(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    page_size = k_cache.shape[1]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    for x, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        x = x[: len(slot_mapping)][written]
        if kv_cache_dtype in ("fp8", "fp8_e4m3"):
            x = to_e4m3(x, scale).view(torch.uint8)
        cache[slots // page_size, slots % page_size] = x


def flash_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **options):
    """Probabilities are in the output's precision, as in vLLM's kernels for 16 bits."""
    assert q[cu_seqlens_q[-1] :].float().isnan().all(), "what belongs to no request is padding"
    for row, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        seq_len = int(seqused_k[row])
        pages = block_table[row, : math.ceil(seq_len / k.shape[1])].long()
        # PyTorch takes no rows of e4m3 by their numbers.
        keys, values = (codes(x)[pages].view(x.dtype).flatten(0, 1)[:seq_len].float() for x in (k, v))
        queries = q[start:end].float()
        if q.dtype == torch.float8_e4m3fn:
            q_scale, k_scale, v_scale = (options[f"{name}_descale"][row, :, None] for name in "qkv")
            queries = queries * q_scale.repeat_interleave(q.shape[1] // len(q_scale), dim=0)
            keys, values = keys * k_scale, values * v_scale
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[2], dim=1) for x in (keys, values))
        logits = softmax_scale * torch.einsum("thd,shd->hts", queries, keys)
        if causal:
            hidden = torch.ones(end - start, seq_len, dtype=torch.bool).triu(seq_len - (end - start) + 1)
            logits.masked_fill_(hidden, -torch.inf)
        if options.get("s_aux") is not None:
            logits = torch.cat([logits, options["s_aux"].float().view(-1, 1, 1).expand(-1, end - start, 1)], dim=-1)
        p = logits.softmax(dim=-1)[..., :seq_len].to(out.dtype)
        out[start:end] = torch.einsum("hts,shd->thd", p.float(), values)


def _quantise(x, scale):
    return to_e4m3(x, scale), scale


@contextlib.contextmanager
def plain_kernels(attention=flash_attention):
    """vLLM's FlashAttention classes call plain PyTorch in place of its kernels."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends import flash_attn

    with (
        mock.patch.object(flash_attn, "reshape_and_cache_flash", _write_cache, create=True),
        mock.patch.object(flash_attn, "flash_attn_varlen_func", attention, create=True),
        # Of vLLM before 0.12.0, whose layer leaves the query as it is.
        mock.patch.object(_custom_ops, "scaled_fp8_quant", _quantise),
    ):
        yield
