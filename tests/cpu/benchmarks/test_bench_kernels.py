"""The checks of kernel rows, the kernels run by Triton's interpreter in processes of their own."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

STAGES = """
import dataclasses
import torch
from benchmarks import bench_kernels
from benchmarks.bench_kernels import KINDS, Stages, alpha_for_density, numbers
from benchmarks.kernel_data import structured_qkv
from vllm_flashprefill.reference import flash_prefill_ref, sparse_attention_fp8_ref, sparse_attention_ref

# The interpreter has no products in bfloat16.
qkv = structured_qkv(1152, heads=2, kv_heads=1, dim=64, device="cpu", dtype=torch.float16)

def stages(kind, **options):
    kv_dtype, compute_dtype = KINDS[kind]
    made = Stages(*qkv, kv_dtype=kv_dtype, compute_dtype=compute_dtype, **{"piece_size": 0, **options})
    made.config = dataclasses.replace(made.config, alpha=0.3, num_window_blocks=1, num_dense_tail_blocks=1)
    made.schedule = made.make_schedule()
    return made

def fails(made):
    try:
        made.check()
    except AssertionError as error:
        return str(error)
    raise SystemExit("the check passed")
"""


def run(code):
    # TRITON_INTERPRET must be set before Triton is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STAGES + code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-3000:]}"


def test_both_caches_pass_the_check_at_one_density():
    run("""
found = []
for kind in ("bf16", "e4m3"):
    for options in ({}, {"page_size": 128}, {"query_len": 512}, {"lengths": (640, 512)}, {"piece_size": 8}):
        made = stages(kind, **options)
        ratio, ties, seen = made.check()
        assert 0.1 < ratio <= 2 and seen > 0, (kind, options, ratio, seen)
    assert made.out.dtype == torch.float16
    made = stages(kind)
    alpha_for_density(made, 0.7)
    found.append(made.density())
assert all(0.7 <= density < 0.8 for density in found), found
""")


def test_what_a_selection_split_is_not_counted_by_the_next():
    run("""
from vllm_flashprefill.kernels import schedule
schedule.tiles_of_a_part = lambda *_: 3
made = stages("bf16")
assert made.density() > 0 and made.counters.any() and not made.schedule.counters.any()
made.check()
""")


def test_a_wrong_output_over_an_e4m3_cache_fails():
    run("""
made = stages("e4m3")
right = made.all
made.all = lambda: (right(), made.out.mul_(1.01))
assert "times plain PyTorch's" in fails(made)
""")


def test_products_in_e4m3_err_as_their_reference():
    run("""
try:
    stages("e4m3-fp8")
except RuntimeError as error:
    assert "no kernel" in str(error)
else:
    raise SystemExit("there is no such kernel here")
bench_kernels.takes_fp8_products = lambda q, kv: True
made = stages("e4m3-fp8")
assert made.value_tiles.shape == (1, 9, 64, 128) and made.config.compute_dtype == "fp8"
# What runs here are 16-bit products.
assert "which these cannot be" in fails(made)

q, k, v = (x[0].float() for x in made.numbers)
arguments = dict(config=made.config, softmax_scale=made.scale)
coarse = flash_prefill_ref(q, k, v, **arguments, attend=sparse_attention_fp8_ref)
exact = flash_prefill_ref(q, k, v, **arguments, attend=sparse_attention_ref)
assert 0.01 < (coarse - exact).norm() / exact.norm() < 0.03
made.all = lambda: made.out.copy_(coarse)
ratio, _, seen = made.check()
assert 0.99 < ratio < 1.01 and seen > 0, ratio
made.all = lambda: made.out.copy_(exact + 1.2 * (coarse - exact))
assert "times that of the reference" in fails(made)
""")
