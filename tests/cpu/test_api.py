from functools import partial

import numpy as np
import pytest
import torch

from tests.support.bad_input import check_bad_calls
from vllm_flashprefill import FlashPrefillConfig, checks
from vllm_flashprefill.api import flash_prefill, flash_prefill_paged, flash_prefill_varlen
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import plan_step
from vllm_flashprefill.reference import flash_prefill_paged_ref


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_is_one_clear_error(device):
    check_bad_calls(device)


def test_tensors_that_are_alike_are_checked_once_a_step(monkeypatch):
    checked = []
    check = checks._check_paged
    monkeypatch.setattr(checks, "_check_paged", lambda *arguments: checked.append(None) or check(*arguments))
    config = FlashPrefillConfig(min_sparse_tokens=0, num_dense_tail_blocks=0)
    q, cache, table = torch.zeros(1000, 4, 64), torch.zeros(2, 80, 16, 2, 64), torch.zeros(1, 80, dtype=torch.int32)

    def layer(plan, q=q, cache=cache, table=table, **more):
        more = dict(out=torch.zeros(1000, 4, 64), sinks=torch.zeros(4), softmax_scale=1.0) | more
        flash_prefill_paged(q, KeyValues(*cache, table), plan, config=config, **more)
        return len(checked)

    def new_plan():
        return plan_step(np.array([0, 1000]), np.array([1000]), config)

    plan = new_plan()
    assert plan.sparse
    with torch.no_grad():
        assert [layer(plan), layer(plan), layer(plan, torch.ones(1000, 4, 64))] == [1, 1, 1]
        assert [layer(plan, torch.zeros(1001, 4, 64)[1:]), layer(plan, table=torch.cat([table, table]))] == [1, 2]
        assert layer(new_plan()) == 3
        for name, misfit in (
            ("q", dict(q=torch.zeros(1000, 64, 4).transpose(1, 2))),
            ("k", dict(cache=torch.zeros(2, 80, 24, 2, 64))),
            ("block_table", dict(table=table[:, :10])),
            ("block_table", dict(table=None)),
            ("out", dict(out=torch.zeros(1000, 4, 64, dtype=torch.float64))),
            ("sinks", dict(sinks=torch.zeros(5))),
            ("block_counts", dict(block_counts=torch.zeros(2))),
            ("q_scale", dict(q_scale=1.0)),
            ("softmax_scale", dict(softmax_scale=0.0)),
        ):
            for _ in range(2):
                with pytest.raises(ValueError, match=rf"^{name}: "):
                    layer(plan, **misfit)
        num_checked = layer(plan)
        assert layer(plan) == num_checked
    with pytest.raises(ValueError, match=r"^q: requires a gradient"):
        layer(plan, q.clone().requires_grad_())


@pytest.mark.parametrize("shape", [(1, 300, 4, 64), (300, 4, 64)])
def test_a_device_without_stages_is_one_clear_error(shape):
    q = torch.zeros(shape, dtype=torch.float16, device="meta")
    call = flash_prefill if len(shape) == 4 else partial(flash_prefill_varlen, cu_seqlens=[0, 300])
    with pytest.raises(ValueError, match=r"^q: must be on a CPU or a CUDA GPU, not on meta$"):
        call(q, q, q)


def test_a_scale_may_be_a_number_of_numpys():
    q = torch.randn(1, 64, 2, 16)
    scale = 1 / np.sqrt(np.float64(16))
    assert type(checks.checked_scale(scale, q)) is float
    out = flash_prefill(q, q, q, softmax_scale=scale)
    torch.testing.assert_close(out, flash_prefill(q, q, q), rtol=0, atol=0)


def test_the_cpu_takes_any_head_size():
    q = torch.randn(1, 200, 2, 24)
    assert flash_prefill(q, q, q).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("num_scales", [0, 1, 2])
def test_an_e4m3_cache_is_its_scaled_values(dtype, num_scales):
    options = dict(num_sink_blocks=1, num_window_blocks=1, num_dense_tail_blocks=1, min_sparse_tokens=0)
    config = FlashPrefillConfig(alpha=0.5, **options)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(500, 4, 64, generator=generator)
    k, v = (torch.randn(2, 48, 16, 2, 64, generator=generator) * 20).to(torch.float8_e4m3fn)
    plan = plan_step(np.array([0, 500]), np.array([700]), config)
    # A table within a wider one.
    table = torch.randperm(48, generator=generator, dtype=torch.int32).view(1, 48).repeat(1, 3)[:, :48]
    scales, wide = {}, [k.float(), v.float()]
    if num_scales:
        k_scale, v_scale = torch.rand(2, num_scales, generator=generator)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        wide = [x * scale[:, None] for x, scale in zip(wide, scales.values(), strict=True)]
    options = dict(config=config, softmax_scale=0.125)
    expected = flash_prefill_paged(q, KeyValues(*wide, table), plan, **options, out=torch.empty_like(q))
    kv = KeyValues(k.view(dtype), v.view(dtype), table, **scales)
    out = flash_prefill_paged(q, kv, plan, **options, out=torch.empty_like(q))
    assert not expected.isnan().any() and plan.sparse
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    # Queries in e4m3 likewise.
    few, scale = q.to(torch.float8_e4m3fn), torch.rand(num_scales) if num_scales else None
    by_head = few.float() * (1 if scale is None else scale.repeat_interleave(4 // num_scales)[:, None])
    expected = flash_prefill_paged(by_head, KeyValues(*wide, table), plan, **options, out=torch.empty_like(q))
    out = torch.empty_like(q, dtype=torch.bfloat16)
    flash_prefill_paged(few, kv, plan, **options, q_scale=scale, out=out)
    assert torch.equal(out, expected.bfloat16())
    out = flash_prefill_paged_ref(few, kv, plan, **options, q_scale=scale, out=torch.empty_like(q))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_cpu_caches_have_any_strides():
    config = FlashPrefillConfig(alpha=0.5, num_sink_blocks=0, num_window_blocks=1, min_sparse_tokens=0)
    q, (k, v) = torch.randn(600, 4, 32), torch.randn(2, 40, 16, 2, 32)
    table = torch.randperm(40, dtype=torch.int32)[None]
    plan = plan_step(np.array([0, 600]), np.array([640]), config)
    options = dict(config=config, softmax_scale=1.0)
    expected = flash_prefill_paged(q, KeyValues(k, v, table), plan, **options, out=torch.empty_like(q))
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    out = flash_prefill_paged(q, KeyValues(k, v, table), plan, **options, out=torch.empty_like(q))
    assert k.stride(-1) != 1 and torch.equal(out, expected)
