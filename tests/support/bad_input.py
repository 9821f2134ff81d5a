"""Calls of the API that must each be one ValueError naming the argument; on any device, "meta" standing for a GPU."""

import dataclasses

import numpy as np
import pytest
import torch

from vllm_flashprefill.api import flash_prefill, flash_prefill_paged, flash_prefill_varlen
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import plan_step


def check_bad_calls(device):
    for number, (name, call) in enumerate(bad_calls(device)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
            pytest.fail(f"call {number}, of a bad {name}, went through")


def bad_calls(device):
    """(argument, call) pairs; q is float16, 300 tokens of 4 heads of 64, k and v have 2 heads."""
    q, k, v = (torch.zeros(1, 300, heads, 64, device=device, dtype=torch.float16) for heads in (4, 2, 2))
    strided = torch.zeros(1, 300, 4, 128, device=device, dtype=torch.float16)[..., ::2]
    elsewhere = "meta" if torch.device(device).type == "cpu" else "cpu"
    calls = [
        ("q", lambda: flash_prefill(q[0], k, v)),
        ("q", lambda: flash_prefill(strided, k, v)),
        ("q", lambda: flash_prefill(q[:, :, :0], k, v)),
        ("q", lambda: flash_prefill(q.int(), k.int(), v.int())),
        ("k", lambda: flash_prefill(q, k[0], v)),
        ("k", lambda: flash_prefill(q, strided[:, :, :2], v)),
        ("k", lambda: flash_prefill(q, k.bfloat16(), v)),
        ("k", lambda: flash_prefill(q, k.to(torch.uint8), v.to(torch.uint8))),
        ("k", lambda: flash_prefill(q, torch.zeros_like(k, device=elsewhere), v)),
        ("k", lambda: flash_prefill(q, k[:, :200], v[:, :200])),
        ("k", lambda: flash_prefill(q, k[..., :32], v[..., :32])),
        ("k", lambda: flash_prefill(q[:, :, :3], k, v)),
        ("k", lambda: flash_prefill(q, k[:, :, :0], v[:, :, :0])),
        ("k", lambda: flash_prefill(q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))),
        ("v", lambda: flash_prefill(q, k, v[0])),
        ("v", lambda: flash_prefill(q, k, strided[:, :, :2])),
        ("v", lambda: flash_prefill(q, k, v.bfloat16())),
        ("v", lambda: flash_prefill(q, k, v[:, :200])),
        ("v", lambda: flash_prefill(q, k, torch.zeros_like(v, device=elsewhere))),
        ("out", lambda: flash_prefill(q, k, v, out=q[:, :10])),
        ("out", lambda: flash_prefill(q, k, v, out=strided)),
        ("out", lambda: flash_prefill(q, k, v, out=q.bfloat16())),
        ("out", lambda: flash_prefill(q, k, v, out=torch.zeros_like(q, device=elsewhere))),
        ("softmax_scale", lambda: flash_prefill(q, k, v, softmax_scale=-1.0)),
        ("softmax_scale", lambda: flash_prefill(q, k, v, softmax_scale=float("nan"))),
        ("prompt_len", lambda: flash_prefill(q, k, v, prompt_len=7)),
        ("prompt_len", lambda: flash_prefill(q, k, v, prompt_len=2**40)),
        ("q", lambda: flash_prefill_varlen(q, k[0], v[0], [0, 300])),
        ("k", lambda: flash_prefill_varlen(q[0], k[0, :299], v[0, :299], [0, 300])),
        ("q", lambda: flash_prefill(q.clone().requires_grad_(), k, v)),
        ("v", lambda: flash_prefill(q, k, v.clone().requires_grad_())),
    ]
    for bounds in (
        [0, 200, 100, 300], [0, 100, 100, 300], [0, 299], [0, 301], [1, 300], [-1, 300], [0], [], [0, 1.5, 300],
        torch.tensor([0.0, 300.0]), torch.tensor([[0, 300]]),
    ):  # fmt: skip
        calls.append(("cu_seqlens", lambda bounds=bounds: flash_prefill_varlen(q[0], k[0], v[0], bounds)))
    fp8 = FlashPrefillConfig(compute_dtype="fp8")
    calls += [
        ("compute_dtype", lambda: flash_prefill(q, k, v, config=fp8)),
        ("compute_dtype", lambda: flash_prefill_varlen(q[0], k[0], v[0], [0, 300], config=fp8)),
    ]
    if torch.device(device).type != "cpu":
        calls += [
            ("q", lambda: flash_prefill(q.float(), k.float(), v.float())),
            ("q", lambda: flash_prefill(q[..., :48], k[..., :48], v[..., :48])),
        ]
    return calls + bad_paged_calls(q[0, :288], elsewhere)


FIELDS = [field.name for field in dataclasses.fields(KeyValues)]


def bad_paged_calls(q, elsewhere):
    cache, strided = (q.new_zeros(18, 16, 2, dim) for dim in (64, 128))
    codes = cache.to(torch.uint8)
    fp8 = dict(k=codes, v=codes)
    table = torch.zeros(1, 18, device=q.device, dtype=torch.int32)
    options = dict(num_sink_blocks=0, num_window_blocks=1, num_dense_tail_blocks=0, min_sparse_tokens=0)
    config = FlashPrefillConfig(**options)
    plan = plan_step(np.array([0, 288]), np.array([288]), config)
    one = torch.ones(1, device=q.device)

    def call(name, **arguments):
        good = dict(q=q, plan=plan, config=config, softmax_scale=1.0, out=torch.empty_like(q))
        kv = dict(k=cache, v=cache, block_table=table)
        kv.update({name: arguments.pop(name) for name in FIELDS if name in arguments})
        return name, lambda: flash_prefill_paged(**{**good, "kv": KeyValues(**kv), **arguments})

    in_fp8 = dict(config=dataclasses.replace(config, compute_dtype="fp8"))
    wide = codes.repeat(1, 1, 1, 4)
    too_wide = dict(q=q.repeat(1, 1, 4), out=q.repeat(1, 1, 4), k=wide, v=wide, **in_fp8)

    def planned(**changes):
        return dataclasses.replace(plan, sparse=(dataclasses.replace(plan.sparse[0], **changes),))

    return [
        call("q", q=q[None]),
        call("q", q=codes[0, :1], k=codes, v=codes),
        call("q", q=q.to(torch.float8_e4m3fn)),
        call("out", **fp8, q=q.to(torch.float8_e4m3fn), out=q.to(torch.float8_e4m3fn)),
        call("q_scale", **fp8, q_scale=one),
        call("sinks", sinks=one),
        call("sinks", sinks=torch.ones(q.shape[1], dtype=torch.float64, device=q.device)),
        call("sinks", sinks=torch.ones(q.shape[1], dtype=torch.int32, device=q.device)),
        call("sinks", sinks=torch.ones(2 * q.shape[1], device=q.device)[::2]),
        call("sinks", sinks=torch.ones(q.shape[1], device=elsewhere)),
        call("q_scale", **fp8, q=q.to(torch.float8_e4m3fn), q_scale=one.repeat(3)),
        call("k", k=cache[0]),
        call("k", k=cache[:, :15], v=cache[:, :15]),
        call("k", k=cache[:, :0], v=cache[:, :0]),
        call("k", k=cache[:0], v=cache[:0]),
        call("k", k=cache.bfloat16(), v=cache.bfloat16()),
        call("k", k=cache.to(torch.float8_e5m2), v=cache.to(torch.float8_e5m2)),
        call("compute_dtype", **in_fp8),
        # The CPU takes any heads and strides.
        *([call("compute_dtype", **too_wide)] if q.device.type != "cpu" else []),
        *([call("k", k=strided[..., ::2])] if q.device.type != "cpu" else []),
        call("k", k=torch.zeros_like(cache, device=elsewhere)),
        call("v", v=cache[0]),
        call("v", v=cache[:17]),
        call("v", v=codes),
        call("v", k=codes, v=codes.view(torch.float8_e4m3fn)),
        call("v", v=torch.zeros_like(cache, device=elsewhere)),
        call("block_table", block_table=None),
        call("block_table", block_table=table[0]),
        call("block_table", block_table=table[:, :17]),
        call("block_table", block_table=table[:0]),
        call("block_table", block_table=table.long()),
        call("block_table", block_table=table.repeat(1, 2)[:, ::2]),
        call("block_table", block_table=torch.zeros_like(table, device=elsewhere)),
        call("block_table", plan=planned(index=-1)),
        call("plan", plan=planned(query_start=1)),
        call("plan", plan=planned(query_start=-1)),
        call("plan", plan=planned(query_len=0)),
        call("plan", plan=planned(context_len=-1)),
        call("plan", plan=planned(prompt_len=287)),
        call("plan", plan=planned(prompt_len=2**40)),
        call("softmax_scale", softmax_scale=0.0),
        call("out", out=torch.empty_like(q[:287])),
        call("k_scale", k_scale=one),
        call("v_scale", v_scale=one),
        call("k_scale", **fp8, k_scale=2.0),
        call("k_scale", **fp8, k_scale=one.half()),
        call("k_scale", **fp8, k_scale=one.repeat(3)),
        call("k_scale", **fp8, k_scale=one.repeat(2)[None]),
        call("k_scale", **fp8, k_scale=torch.ones(1, device=elsewhere)),
        call("v_scale", **fp8, v_scale=one.double()),
        call("v_scale", **fp8, v_scale=one.repeat(4)),
    ]
