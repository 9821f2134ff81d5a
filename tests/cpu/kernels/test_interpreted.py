"""The GPU tests' checks at small shapes, the kernels run by Triton's interpreter, in processes of their own."""

import concurrent.futures
import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

IMPORTS = """
import torch
from tests.support.kernel_cases import check_all, make_batch, sparse_config
from tests.support.request import Request
"""

QUERIES_IN_E4M3 = (
    "page_size=16, requests=[Request(300, 340, 128), Request(129)], kv_dtype=torch.uint8, kv_scales={scales!r}, "
    "q_e4m3=True"
)
# One process runs a group, since each one imports torch: (alpha, arguments of `make_batch`).
GROUPS = {
    "paged": {
        "chunks": (0.3, "page_size=16, requests=[Request(300, 640, 128), Request(1), Request(129, 511)]"),
        "chunks_at_alpha_0": (0.0, "page_size=16, requests=[Request(300, 640, 128), Request(1), Request(129, 511)]"),
        "pages_of_48": (0.3, "page_size=48, requests=[Request(700, 0, 300), Request(127)]"),
        "pages_of_256": (0.3, "page_size=256, requests=[Request(260, 640)], heads_first=True, fused_qkv=True"),
    },
    "plain": {
        "ragged": (0.3, "requests=[Request(1100), Request(128), Request(1), Request(257)]"),
        "slabs": (0.3, "requests=[Request(900)], slab_bytes=300"),
        "one_kv_head": (0.3, "requests=[Request(800)], heads=3, kv_heads=1, dim=128"),
        "sinks": (0.3, "requests=[Request(520), Request(1)], sinks=True"),
    },
    "pieces": {
        "chunks": (0.9, "page_size=16, requests=[Request(300, 640, 128), Request(1), Request(129, 1023)]"),
        "pages_of_48": (0.8, "page_size=48, requests=[Request(700, 0, 300), Request(127)]"),
        "best": (1.0, "requests=[Request(1020), Request(520)], heads=3, kv_heads=1, dim=128"),
        # More candidates than are looked at first, so that rows have their best among the others.
        "many": (0.95, "page_size=16, requests=[Request(200, 3500, 50)], heads=2, kv_heads=1"),
        "alpha_0": (0.0, "page_size=16, requests=[Request(700, 57)]"),
    },
    "parts": {
        "chunks": (0.3, "page_size=16, requests=[Request(300, 640, 128), Request(1), Request(129, 511)], part_tiles=2"),
        "alpha_0": (0.0, "page_size=48, requests=[Request(300, 900)], part_tiles=3, sinks=True, heads=2, kv_heads=1"),
        "more_than_there_is_room_for": (0.0, "requests=[Request(900)], heads=2, kv_heads=1, part_tiles=1"),
        "slabs": (0.3, "requests=[Request(900)], slab_bytes=300, part_tiles=2"),
        "e4m3": (
            0.3, "page_size=16, requests=[Request(200, 500)], kv_dtype=torch.uint8, kv_scales='head', part_tiles=2"
        ),
        "chosen": (0.3, "page_size=256, requests=[Request(20, 4200)], heads=2, kv_heads=1, part_tiles=None"),
    },
    "e4m3": {
        "scales_of_heads": (
            0.3,
            "page_size=16, requests=[Request(300, 640, 128), Request(129)], kv_dtype=torch.uint8, kv_scales='head', "
            "dtype=torch.bfloat16",
        ),
        "one_scale": (
            0.3, "page_size=48, requests=[Request(500, 40, 128)], kv_dtype=torch.float8_e4m3fn, kv_scales='one'"
        ),
        "no_scale": (0.3, "page_size=256, requests=[Request(450)], kv_dtype=torch.uint8, dim=128"),
        **{f"queries, {scales}": (0.3, QUERIES_IN_E4M3.format(scales=scales)) for scales in ("none", "head")},
    },
    "e4m3, pieces": {
        "chunks": (
            0.8, "page_size=128, requests=[Request(500, 240, 128), Request(129)], kv_dtype=torch.uint8, "
            "kv_scales='head'"
        ),
        **{f"queries, {scales}": (0.8, QUERIES_IN_E4M3.format(scales=scales)) for scales in ("none", "head")},
    },
}  # fmt: skip


def run_interpreted(code):
    # TRITON_INTERPRET must be set before Triton is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"{run.stdout[-1000:]}{run.stderr[-3000:]}"


def check_group(group):
    options = ", piece_size=8, candidate_alpha=0.05" if "pieces" in group else ""
    cases = "\n".join(
        f"print({name!r}, flush=True)\n"
        f"config = sparse_config(alpha={alpha}{options})\n"
        f"check_all(make_batch(config=config, {batch}), config, 0.125)"
        for name, (alpha, batch) in GROUPS[group].items()
    )
    run_interpreted(IMPORTS + cases)


@pytest.fixture(scope="module")
def groups():
    """What checks each group; the interpreter takes one core, so that they run beside each other."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {group: pool.submit(check_group, group) for group in GROUPS}


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_all_stages_interpreted(groups, group):
    groups[group].result()


@needs_triton
def test_a_step_that_failed_may_be_tried_again_interpreted():
    run_interpreted(
        IMPORTS
        + """
from vllm_flashprefill.kernels import pipeline
config = sparse_config(alpha=0.3)
batch = make_batch([Request(40, 700)], config=config, page_size=48, heads=2, kv_heads=1, part_tiles=2)
def run():
    out = torch.full_like(batch.q, torch.nan)
    return pipeline.run_stages(batch.q, batch.kv, batch.schedule, config=config, softmax_scale=0.125, out=out)
expected, join = run(), pipeline.join_parts
def fail(*args, **options):
    assert batch.schedule.counters.any(), "no list is split"
    raise MemoryError
pipeline.join_parts = fail
try:
    run()
except MemoryError:
    assert not batch.schedule.counters.any()
else:
    raise SystemExit("nothing was joined")
pipeline.join_parts = join
assert torch.equal(run(), expected)
"""
    )


@needs_triton
def test_pieces_of_other_sizes_interpreted():
    cases = "\n".join(
        f"config = sparse_config(alpha=0.95, piece_size={piece_size}, candidate_alpha={candidate_alpha})\n"
        "batch = make_batch(config=config, page_size=16, requests=[Request(200, 2800, 50)], heads=2, kv_heads=1)\n"
        "check_all(batch, config, 0.125)"
        for piece_size, candidate_alpha in ((4, 0.0), (64, 0.0))
    )
    run_interpreted(IMPORTS + cases)


@needs_triton
@pytest.mark.parametrize("piece_size", [0, 8])
def test_wide_heads_where_shared_memory_is_small_interpreted(piece_size):
    run_interpreted(
        IMPORTS + "from vllm_flashprefill.kernels import configs\n"
        "configs.gpu_kind = lambda device: 'small'\n"
        f"config = sparse_config(alpha={0.8 if piece_size else 0.3}, piece_size={piece_size})\n"
        "requests = [Request(300, 420), Request(1)]\n"
        "batch = make_batch(requests, config=config, page_size=16, heads=2, kv_heads=1, dim=256)\n"
        "check_all(batch, config, 0.0625)"
    )


@needs_triton
@pytest.mark.parametrize("options", ["alpha=0.3, piece_size=0", "alpha=0.8, piece_size=8"])
def test_queries_that_are_not_numbers_interpreted(options):
    run_interpreted(
        "from tests.support.kernel_cases import check_nan_queries, make_batch, sparse_config\n"
        "from tests.support.request import Request\n"
        f"config = sparse_config({options})\n"
        "batch = make_batch(config=config, requests=[Request(1300)], heads=2, kv_heads=1)\n"
        "check_nan_queries(batch, config, 0.125)"
    )


@needs_triton
def test_values_are_transposed_interpreted():
    cases = "\n".join(
        f"check_value_tiles(make_batch(config=sparse_config(), kv_dtype=torch.uint8, kv_scales='head', {batch}))"
        for batch in (
            "page_size=16, requests=[Request(300, 340, 128), Request(129)]",
            "page_size=48, requests=[Request(1), Request(500, 40, 128)], heads_first=True, dim=128",
            "requests=[Request(257), Request(128)]",
        )
    )
    run_interpreted(IMPORTS + "from tests.support.kernel_cases import check_value_tiles\n" + cases)


@needs_triton
def test_every_e4m3_code_is_read_as_what_it_stands_for():
    run_interpreted("from tests.support.kernel_cases import check_e4m3_codes\ncheck_e4m3_codes('cpu', native=False)")


@needs_triton
def test_more_requests_than_a_grid_takes_are_pooled_in_several_launches():
    run_interpreted(
        IMPORTS
        + """
from types import SimpleNamespace
from vllm_flashprefill.kernels import block_mean
from vllm_flashprefill.key_values import KeyValues

class Kernel:
    grids = []
    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None

schedule = SimpleNamespace(requests=torch.zeros(140_000, 8, dtype=torch.int32), max_key_blocks=1, num_mean_rows=1)
kernel, block_mean._block_mean_kernel = block_mean._block_mean_kernel, Kernel()
k = torch.zeros(1, 16, 3, 64)
block_mean.block_mean(KeyValues(k, k), schedule)
assert Kernel.grids == [(1, 3, 65_535), (1, 3, 65_535), (1, 3, 8_930)], Kernel.grids

block_mean._block_mean_kernel, block_mean.MAX_REQUESTS = kernel, 2
config = sparse_config(alpha=0.3)
check_all(make_batch(config=config, requests=[Request(150), Request(1), Request(129)]), config, 0.125)
"""
    )
