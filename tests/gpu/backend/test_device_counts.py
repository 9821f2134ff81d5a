"""The counters and the shared scratch that vLLM's impl gives the kernels; no vLLM is needed."""

import time

import pytest
import torch

pytest.importorskip("triton")

from tests.support.kernel_cases import nan_workspace, planned_batch, sparse_config
from tests.support.request import Request
from vllm_flashprefill import counters
from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend.device_counts import DeviceCounts
from vllm_flashprefill.kernels.workspace import Workspace, scratch_bytes
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.reference import flash_prefill_paged_ref

SCALE = 0.125
HEADS = 4


@pytest.fixture
def step():
    config = sparse_config(min_sparse_tokens=1000)
    requests = [Request(1, 500), Request(2000), Request(300), Request(900, 1100, 200)]
    batch, plan = planned_batch(requests, config, page_size=16, device="cuda", dim=128, dtype=torch.bfloat16)
    assert len(plan.sparse) == 2

    def run(**options):
        out = torch.zeros_like(batch.q[0])
        flash_prefill_paged(batch.q[0], batch.kv, plan, config=config, softmax_scale=SCALE, out=out, **options)
        return out

    return batch, plan, config, run


def test_counts_are_the_references(step):
    batch, plan, config, run = step
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    run(block_counts=counts)
    expected = torch.zeros(2, dtype=torch.int64)
    q, *kv = (x.cpu() for x in (batch.q[0], batch.kv.k, batch.kv.v, batch.kv.block_table))
    out = torch.zeros_like(q)
    flash_prefill_paged_ref(q, KeyValues(*kv), plan, config=config, softmax_scale=SCALE, out=out, block_counts=expected)
    (kept, visible), (expected_kept, expected_visible) = counts.tolist(), expected.tolist()
    assert visible == expected_visible == HEADS * plan.visible_blocks
    # Blocks at the threshold may fall on either side.
    assert abs(kept - expected_kept) <= 0.005 * visible
    assert kept < visible


def test_scratch_from_a_workspace_changes_nothing(step):
    _, _, _, run = step
    expected = run()
    enough = scratch_bytes(
        num_heads=HEADS,
        num_kv_heads=2,
        head_size=128,
        max_query_tokens=4096,
        max_seq_len=4096,
        num_pieces=16,
        fp8_products=False,
        device=torch.device("cuda"),
    )
    for num_bytes in (enough, 1000):
        workspace = nan_workspace("cuda", num_bytes)
        for _ in range(2):
            assert torch.equal(run(workspace=workspace), expected)


def test_a_reserved_workspace_allocates_nothing(step):
    _, _, _, run = step
    workspace = Workspace(torch.device("cuda"))
    workspace.reserve(128 << 20)
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    out_bytes = run(workspace=workspace, block_counts=counts).nbytes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(workspace=workspace, block_counts=counts)
    # The output, and the sum of the counts.
    assert torch.cuda.max_memory_allocated() - before <= out_bytes + 4096


def test_layers_are_counted_without_waiting(step, no_sync, shared_stats):
    _, plan, _, run = step
    torch.cuda.set_sync_debug_mode("default")
    try:
        layer = DeviceCounts(torch.device("cuda")).new_layer()
        run(block_counts=layer.blocks)
        kept = int(layer.blocks[0])
        layer.blocks.zero_()
        torch.cuda.set_sync_debug_mode("error")
        # Layers run in inference mode, the counters were not made in it.
        with torch.inference_mode():
            for _ in range(3):
                run(block_counts=layer.blocks)
                layer.step_done(plan, HEADS)
        for _ in range(500):
            total = counters.read_stats()
            if total.visible_blocks == 3 * HEADS * plan.visible_blocks:
                break
            time.sleep(0.01)
        assert total.kept_blocks == 3 * kept
        assert layer.arrived.tolist() == [total.kept_blocks, total.visible_blocks]
        assert total.visible_blocks == 3 * HEADS * plan.visible_blocks
        assert total.sparse_tokens == 3 * plan.num_sparse_tokens
    finally:
        torch.cuda.set_sync_debug_mode("default")
