"""The CUDA classes of the installed vLLM beside vLLM's own, on random batches.

FLASHPREFILL_TEST_BATCHES is how many batches, 200 if it is not set; with -n 8 of pytest-xdist 8 processes share them.
"""

import importlib.util
import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from tests.support.batch_checks import Pair, check_calls, run_batches
from tests.support.batch_step import Step
from tests.support.random_batch import Batch, random_batch, shapes, spread
from tests.support.request import Request
from tests.support.vllm_side import Shape
from vllm_flashprefill.backend.device_counts import device_counts
from vllm_flashprefill.kernels import pipeline
from vllm_flashprefill.kernels.value_tiles import value_tiles

NUM_BATCHES = int(os.environ.get("FLASHPREFILL_TEST_BATCHES") or 200)
HEADS = [(8, 2), (28, 4), (4, 4)]
HEAD_SIZES = [64, 128, 256]
PAGE_SIZES = [16, 32, 128]
SHAPES = shapes(HEADS, HEAD_SIZES, [torch.bfloat16, torch.float16], PAGE_SIZES)
# Each head size with each page size, and each number of heads with both. vLLM's kernel writes bfloat16 here.
QUANTISED = [
    Shape(*HEADS[(n + n // 3) % 3], head_size, torch.bfloat16, page_size, "fp8")
    for n, (head_size, page_size) in enumerate(itertools.product(HEAD_SIZES, PAGE_SIZES))
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_options(monkeypatch):
    """FLASHPREFILL_TEST_BATCHES would be taken for an option."""
    for name in [name for name in os.environ if name.startswith("FLASHPREFILL")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("shape, seeds", [pytest.param(*case, id=str(case[0])) for case in spread(SHAPES, NUM_BATCHES)])
def test_batches(shape, seeds):
    kept, visible = run_batches(shape, DEVICE, seeds)
    assert kept <= visible
    assert len(seeds) < 20 or 0 < kept < visible


@pytest.mark.parametrize(
    "shape, seeds", [pytest.param(*case, id=str(case[0])) for case in spread(QUANTISED, max(9, NUM_BATCHES // 20))]
)
def test_batches_with_an_e4m3_cache(shape, seeds):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("vLLM's FlashAttention takes an fp8 cache on Hopper only")
    kept, visible = run_batches(shape, DEVICE, seeds)
    assert kept <= visible
    assert len(seeds) < 20 or 0 < kept < visible


@pytest.mark.parametrize(
    "shape, seeds",
    [
        pytest.param(*case, id=str(case[0]))
        for case in spread([shape for shape in QUANTISED if shape.head_size < 256], max(6, NUM_BATCHES // 20))
    ],
)
def test_batches_with_products_in_e4m3(shape, seeds, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("products in e4m3 are for Hopper GPUs")
    transposed = []
    monkeypatch.setattr(pipeline, "value_tiles", lambda *args: transposed.append(None) or value_tiles(*args))
    run_batches(shape, DEVICE, seeds, options={"compute_dtype": "fp8"})
    assert transposed, "products were in 16 bits"


def batch_of(*requests, full_graphs=False, alpha=0.3):
    return Batch(0, 16, list(requests), 3, False, True, full_graphs, alpha, 1, 300)


@pytest.mark.parametrize("full_graphs", [False, True])
def test_a_step_with_no_sparse_request_is_vllms_own(full_graphs):
    pair = Pair(Shape(8, 2, 128, torch.bfloat16, 16), DEVICE, full_graphs)
    batch = batch_of(Request(1, 400), Request(200), Request(5, 700, -4), full_graphs=full_graphs)
    with torch.inference_mode():
        step = Step(batch, pair)
        pair.ours.set_config(batch.config(batch.alpha))
        with pair.watched() as seen:
            out, metadata = step.run(pair.ours)
        vllms, _ = step.run(pair.vllms)
    assert not metadata.flashprefill.plan.sparse
    ((built, _),) = seen.built
    (call,) = seen.calls
    assert call["attn_metadata"] is built is metadata
    assert call["kv_cache"] is step.cache and call["output"] is out
    check_calls(seen, metadata)
    assert torch.equal(out[: step.num_tokens], vllms[: step.num_tokens])


def test_long_prompts_are_pruned():
    pair = Pair(Shape(8, 2, 128, torch.bfloat16, 16), DEVICE, False)
    batch = batch_of(Request(3000), Request(1, 400), Request(1024, 2048, 1000))
    with torch.inference_mode():
        step = Step(batch, pair)
        pair.ours.set_config(batch.config(batch.alpha))
        before = device_counts(DEVICE).blocks.sum(0)
        step.run(pair.ours)
        kept, visible = (device_counts(DEVICE).blocks.sum(0) - before).tolist()
    assert 0.05 * visible < kept < 0.8 * visible


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 2, 64, torch.bfloat16, 32),
        Shape(28, 4, 128, torch.bfloat16, 16),
        Shape(28, 4, 128, torch.float16, 128),
        Shape(4, 4, 256, torch.bfloat16, 16),
    ],
    ids=str,
)
def test_no_step_waits_for_the_gpu(shape):
    """Building the metadata, writing the cache and attending, once what they call is compiled."""
    pairs = {full_graphs: Pair(shape, DEVICE, full_graphs) for full_graphs in (False, True)}
    sparse = dense = 0
    with torch.inference_mode():
        for seed in range(1000, 1020):
            batch = random_batch(seed, shape.page_size)
            pair = pairs[batch.full_graphs]
            step = Step(batch, pair)
            pair.ours.set_config(batch.config(batch.alpha))
            common = step.common()
            try:
                for mode in ("default", "error"):
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode(mode)
                    metadata = step.build(pair.ours, common)
                    step.attend(pair.ours, metadata, common)
            except Exception as error:
                raise AssertionError(f"{error}\n{batch}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
            sparse += len(metadata.flashprefill.plan.sparse)
            dense += len(metadata.flashprefill.plan.dense)
    assert sparse > 10 and dense > 10
