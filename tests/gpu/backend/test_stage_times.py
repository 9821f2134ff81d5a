"""The seconds of the stages that vLLM's impl estimates, against the time the GPU took; no vLLM is needed."""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.kernel_cases import make_batch, sparse_config
from tests.support.request import Request
from vllm_flashprefill import counters
from vllm_flashprefill.backend.stage_times import LAYERS_PER_TURN, stage_times
from vllm_flashprefill.kernels import pipeline
from vllm_flashprefill.kernels.workspace import Workspace


@pytest.mark.parametrize("slab_bytes", [None, 5 << 20])
def test_the_estimate_is_near_the_time_of_all_layers(slab_bytes, shared_stats):
    config = sparse_config()
    batch = make_batch(
        # Layers that take the GPU longer than the host; else the estimate has its waiting for the host in it.
        [Request(65536)], page_size=128, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16, device="cuda",
        config=config, slab_bytes=slab_bytes,
    )  # fmt: skip
    assert (len(batch.schedule.slabs) > 1) == (slab_bytes is not None)
    out, workspace = torch.empty_like(batch.q), Workspace(batch.q.device)
    workspace.reserve(64 << 20)

    def run_layer(mark=None):
        pipeline.run_stages(
            batch.q, batch.kv, batch.schedule, config=config, softmax_scale=0.125, out=out,
            workspace=workspace, mark=mark,
        )  # fmt: skip

    try:
        for _ in range(3):
            run_layer()
        stage_times.cache_clear()
        times = stage_times(batch.q.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for layer in range(5 * LAYERS_PER_TURN):
            torch.cuda.set_sync_debug_mode("error")
            run_layer(times.next_layer())
            torch.cuda.set_sync_debug_mode("default")
            if layer % 16 == 0:
                # As an engine, which is a step or two ahead of the GPU.
                torch.cuda.synchronize()
        end.record()
        end.synchronize()
        total = counters.read_stats()
        # The fifth turn has not been read.
        estimate, taken = total.selection_seconds + total.attention_seconds, start.elapsed_time(end) / 1000 * 4 / 5
        print(
            f"estimate {estimate:.3f} s, of it selection {total.selection_seconds:.3f} s; all layers took {taken:.3f} s"
        )
        assert total.selection_seconds > 0
        assert total.attention_seconds > 0
        assert 0.7 * taken < estimate < 1.1 * taken
    finally:
        torch.cuda.set_sync_debug_mode("default")
