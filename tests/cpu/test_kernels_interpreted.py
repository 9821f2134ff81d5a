"""The GPU tests' checks at small shapes, the kernels run by Triton's interpreter, in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = {
    "paged_chunks": "page_size=16, requests=[Request(300, 640, 128), Request(1), Request(129, 511)]",
    "pages_of_48": "page_size=48, requests=[Request(700, 0, 300), Request(127)]",
    "pages_of_256": "page_size=256, requests=[Request(260, 640)]",
    "plain_ragged": "requests=[Request(1100), Request(128), Request(1), Request(257)]",
    "slabs": "requests=[Request(900)], slab_bytes=300",
    "one_kv_head": "requests=[Request(800)], heads=3, kv_heads=1, dim=128",
}


@needs_triton
@pytest.mark.parametrize(("case", "alpha"), [*((case, 0.3) for case in CASES), ("paged_chunks", 0.0)])
def test_all_stages_interpreted(case, alpha):
    # TRITON_INTERPRET must be set before Triton is imported.
    code = f"""
from kernel_cases import Request, check_all, make_batch, sparse_config
config = sparse_config(alpha={alpha})
check_all(make_batch(config=config, {CASES[case]}), config, 0.125)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
