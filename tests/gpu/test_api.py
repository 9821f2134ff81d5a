"""The public calls, and what they do for a step."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.support.bad_input import check_bad_calls
from tests.support.kernel_cases import planned_batch, sparse_config, split
from tests.support.request import Request, structured
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.api import flash_prefill, flash_prefill_paged, flash_prefill_varlen
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import plan_step
from vllm_flashprefill.reference import flash_prefill_paged_ref

SCALE = 0.125


def test_paged_api_with_an_e4m3_cache():
    config = sparse_config(alpha=0.0, min_sparse_tokens=1000)
    batch, plan = planned_batch(
        [Request(2000), Request(300)], config, page_size=16, device="cuda", kv_dtype=torch.float8_e4m3fn,
        kv_scales="head", dim=128,
    )  # fmt: skip
    options = dict(config=config, softmax_scale=SCALE)
    out = flash_prefill_paged(batch.q[0], batch.kv, plan, **options, out=torch.empty_like(batch.q[0]))
    expected = flash_prefill_paged_ref(batch.q[0], batch.kv, plan, **options, out=torch.empty_like(batch.q[0]))
    torch.testing.assert_close(out[:2000], expected[:2000], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_expanded_heads(dim):
    """KV heads that are one in memory."""
    config = sparse_config()
    q, k, v = structured(2000, 2000, heads=4, kv_heads=1, dim=dim, dtype=torch.bfloat16, device="cuda", seed=0)
    expanded = [x[None].expand(1, -1, 2, -1) for x in (k, v)]
    out = flash_prefill(q[None], *expanded, config=config)
    expected = flash_prefill(q[None], *(x.contiguous() for x in expanded), config=config)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dim", [64, 128])
def test_alpha_0_is_dense(dim):
    q, k, v = structured(5000, 5000, heads=8, kv_heads=2, dim=dim, dtype=torch.bfloat16, device="cuda", seed=0)
    out = flash_prefill(q[None], k[None], v[None], config=FlashPrefillConfig(alpha=0.0))[0]
    expand = [x.repeat_interleave(4, dim=1).transpose(0, 1) for x in (k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double().transpose(0, 1), *(x.double() for x in expand), is_causal=True
    ).transpose(0, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *expand, is_causal=True).transpose(0, 1)
    assert (out.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_batch_equals_one_by_one_and_varlen():
    config = sparse_config()
    parts = [
        structured(1400, 1400, heads=4, kv_heads=2, dim=64, dtype=torch.float16, device="cuda", seed=s)
        for s in range(3)
    ]
    q, k, v = (torch.stack([part[n] for part in parts]) for n in range(3))
    together = flash_prefill(q, k, v, config=config)
    for n in range(3):
        assert torch.equal(together[n : n + 1], flash_prefill(q[n : n + 1], k[n : n + 1], v[n : n + 1], config=config))
    packed = flash_prefill_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), [0, 1400, 2800, 4200], config=config
    )
    assert torch.equal(packed.view_as(together), together)
    # Heads before tokens in memory, as transformers lays them out.
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(flash_prefill(*moved, config=config), together, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("chunk", [128, 512, 896])
def test_aligned_chunks_equal_the_whole(chunk):
    config = sparse_config()
    q, k, v = (
        x[None]
        for x in structured(1900, 1900, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16, device="cuda", seed=1)
    )
    whole = flash_prefill(q, k, v, config=config)
    for start in range(0, 1900, chunk):
        end = min(start + chunk, 1900)
        part = flash_prefill(q[:, start:end], k[:, :end], v[:, :end], config=config, prompt_len=1900)
        assert torch.equal(part, whole[:, start:end])


def test_mixed_step_leaves_other_rows_alone(no_sync):
    torch.cuda.set_sync_debug_mode("default")
    config = sparse_config(min_sparse_tokens=1000)
    batch, plan = planned_batch(
        [Request(1, 500), Request(2000), Request(300), Request(900, 1100, 200)], config, page_size=16, device="cuda"
    )
    assert [request.index for request in plan.sparse] == [1, 3]
    out = torch.full_like(batch.q[0], torch.nan)
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        flash_prefill_paged(batch.q[0], batch.kv, plan, config=config, softmax_scale=SCALE, out=out)
    torch.cuda.set_sync_debug_mode("default")
    pieces = split(out[None], batch)
    for n, piece in enumerate(pieces):
        if n in (1, 3):
            q, k, v = (x[None] for x in batch.parts[n])
            alone = flash_prefill(q, k, v, config=config, softmax_scale=SCALE, prompt_len=batch.requests[n].prompt_len)
            torch.testing.assert_close(piece, alone[0], rtol=2e-3, atol=2e-3)
        else:
            assert piece.isnan().all()


def test_no_length_compiles(no_sync):
    from vllm_flashprefill.kernels.block_mean import _block_mean_kernel
    from vllm_flashprefill.kernels.block_select import _block_select_kernel
    from vllm_flashprefill.kernels.parts import _join_parts_kernel
    from vllm_flashprefill.kernels.sparse_attention import _sparse_attention_kernel

    torch.cuda.set_sync_debug_mode("default")
    config = sparse_config()
    pool = torch.randn(3, 1, 40_000, 4, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 2500, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(2500, device="cuda", dtype=torch.int32)
    generator = np.random.default_rng(0)
    lengths = [1, 16, 2000, 2048, 4097, 8192, *generator.integers(1, 40_000, 50).tolist()]
    kernels = [_block_mean_kernel, _block_select_kernel, _sparse_attention_kernel, _join_parts_kernel]
    if torch.cuda.get_device_capability()[0] == 9:
        from vllm_flashprefill.kernels.sparse_attention_hopper import _sparse_attention_hopper_kernel

        kernels.append(_sparse_attention_hopper_kernel)

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def call(n):
        q, k, v = pool[0][:, :n], pool[1][:, :n, :2], pool[2][:, :n, :2]
        flash_prefill(q, k, v, config=config)
        flash_prefill_varlen(q[0], k[0], v[0], [0, n], config=config)
        pages = -(-n // 16)
        plan = plan_step(np.array([0, n]), np.array([n]), FlashPrefillConfig(min_sparse_tokens=0))
        kv = KeyValues(*cache, table[None, :pages])
        flash_prefill_paged(q[0], kv, plan, config=config, softmax_scale=SCALE, out=torch.empty_like(q[0]))

    # Whose lists are too short to split, and whose are not.
    for n in (3000, 5000):
        call(n)
    before = compiled()
    assert before >= len(kernels)
    torch.cuda.set_sync_debug_mode("error")
    for n in lengths:
        call(n)
    assert compiled() == before


def test_a_plan_used_on_two_streams():
    """The second stream must not read what the first is still uploading, nor the first's memory be given away."""
    from vllm_flashprefill.kernels.schedule import schedule_step

    config = sparse_config(min_sparse_tokens=1000)
    batch, plan = planned_batch([Request(2000)], config, page_size=16, device="cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    schedules = []
    for stream in streams:
        with torch.cuda.stream(stream):
            schedules.append(schedule_step(plan, num_heads=4, num_dense_tail_blocks=1, device=batch.q.device))
    assert schedules[0].items.data_ptr() != schedules[1].items.data_ptr()


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_bad_input_is_one_clear_error(device):
    check_bad_calls(device)
