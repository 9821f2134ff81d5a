import threading

import numpy as np
import pytest
import torch

from vllm_flashprefill import counters
from vllm_flashprefill.api import flash_prefill_paged
from vllm_flashprefill.backend import device_counts
from vllm_flashprefill.backend.device_counts import DeviceCounts
from vllm_flashprefill.config import FlashPrefillConfig
from vllm_flashprefill.key_values import KeyValues
from vllm_flashprefill.plan import SparseRequest, StepPlan, plan_step
from vllm_flashprefill.reference import select_blocks_ref

pytestmark = pytest.mark.usefixtures("shared_stats")
PLAN = StepPlan((SparseRequest(0, 0, 300, 500, 800),), np.empty(0, dtype=np.int64), {})


def test_visible_blocks_of_a_chunk():
    # query blocks 3 to 6 of the sequence
    assert PLAN.visible_blocks == 4 + 5 + 6 + 7
    assert PLAN.num_tokens == 300


def test_a_layer_is_counted_once():
    counts = DeviceCounts(torch.device("cpu"))
    layer = counts.new_layer()
    for _ in range(2):
        layer.blocks += torch.tensor([30, 2 * 22])
        layer.step_done(PLAN, num_heads=2)
        counts.report()
    total = counters.read_stats()
    assert (total.sparse_tokens, total.kept_blocks, total.visible_blocks) == (600, 60, 88)


@pytest.mark.parametrize("num_rows", [3, 2])
def test_each_layer_has_counters_of_its_own_and_the_sum_is_reported(monkeypatch, num_rows):
    """Layers beyond the rows share some."""
    monkeypatch.setattr(device_counts, "NUM_ROWS", num_rows)
    counts = DeviceCounts(torch.device("cpu"))
    with torch.inference_mode():
        layers = [counts.new_layer() for _ in range(3)]
    for kept, layer in enumerate(layers, 1):
        layer.blocks += torch.tensor([kept, 22])
        layer.step_done(PLAN, num_heads=1)
    shares = [[1, 22], [2, 22], [3, 22]] if num_rows == 3 else [[4, 44], [2, 22], [4, 44]]
    assert [layer.arrived.tolist() for layer in layers] == shares
    total = counters.read_stats()
    assert (total.sparse_tokens, total.kept_blocks, total.visible_blocks) == (900, 6, 66)


def test_what_has_not_arrived_is_waited_for_by_the_thread_alone(monkeypatch):
    """As on a GPU, where the copy to the host lands after the call that asked for it."""
    counts = DeviceCounts(torch.device("cpu"))
    monkeypatch.setattr(device_counts, "POLL_SECONDS", 0.001)
    counts._more = threading.Event()
    threading.Thread(target=counts._report_as_it_arrives, daemon=True).start()
    counts.new_layer().step_done(PLAN, num_heads=1)
    assert not counts.report()
    assert counters.read_stats().density is None
    counts._host[0] += torch.tensor([11, 22])
    for _ in range(1000):
        if counters.read_stats().visible_blocks:
            break
        threading.Event().wait(0.005)
    total = counters.read_stats()
    assert (total.sparse_tokens, total.density) == (300, 0.5)
    assert counts.report()


def test_the_cpu_counts_what_it_keeps():
    config = FlashPrefillConfig(alpha=0.5, num_sink_blocks=0, num_window_blocks=1, min_sparse_tokens=0, piece_size=0)
    torch.manual_seed(0)
    starts, seq_lens = np.array([0, 1, 701, 1001]), np.array([40, 700, 600])
    plan = plan_step(starts, seq_lens, config, np.array([40, 700, 2000]))
    assert [request.index for request in plan.sparse] == [1, 2]
    q, out = torch.randn(1001, 4, 32), torch.zeros(1001, 4, 32)
    k_cache, v_cache = torch.randn(2, 100, 16, 2, 32)
    table = torch.randperm(100, dtype=torch.int32)[:90].view(3, 30).repeat(1, 2)
    counts = torch.zeros(2, dtype=torch.int64)
    kv = KeyValues(k_cache, v_cache, table)
    marks = []
    flash_prefill_paged(
        q, kv, plan, config=config, softmax_scale=3.0, out=out, block_counts=counts, mark=lambda: marks.append(None)
    )
    assert len(marks) == 1 + 2 * len(plan.sparse)
    kept = 0
    for request in plan.sparse:
        pages = table[request.index, : -(-request.seq_len // 16)].long()
        kept += select_blocks_ref(
            q[request.query_slice],
            k_cache[pages].flatten(0, 1)[: request.seq_len],
            context_len=request.context_len,
            prompt_len=request.prompt_len,
            config=config,
            softmax_scale=3.0,
        ).sum()
    assert counts.tolist() == [int(kept), 4 * (sum(range(1, 7)) + 3 + 4 + 5)]
    assert counts[0] < counts[1]


def test_counters_that_do_not_fit_are_refused():
    arguments = dict(config=FlashPrefillConfig(), softmax_scale=1.0, out=torch.zeros(0, 4, 32))
    kv = KeyValues(*torch.zeros(2, 1, 16, 2, 32), torch.zeros(1, 1, dtype=torch.int32))
    plan = StepPlan((), np.empty(0, dtype=np.int64), {})
    with pytest.raises(ValueError, match=r"^block_counts:"):
        flash_prefill_paged(
            torch.zeros(0, 4, 32), kv, plan, block_counts=torch.zeros(2, dtype=torch.int32), **arguments
        )
