import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from vllm_flashprefill import kernels

CODE = """
import torch
from tests.support.kernel_cases import make_batch, sparse_config
from tests.support.request import Request
from vllm_flashprefill.kernels import pipeline
config = sparse_config({config})
requests = [Request(300, 640, 128), Request(1), Request(129, 511), Request(400)]
batch = make_batch(requests, {options}, dtype=torch.bfloat16, device="cuda", config=config)
out = torch.full_like(batch.q, torch.nan)
pipeline.run_stages(
    batch.q, batch.kv, batch.schedule, config=config, softmax_scale=0.125, out=out
)
assert not out.isnan().any()
"""


# On Hopper heads of 128 take the Gluon kernels, those of 256 the Triton kernel.
BF16_16, BF16_128, E4M3_16 = "page_size=16", "page_size=128", "page_size=16, kv_dtype=torch.uint8, kv_scales='head'"


WIDE, FP8 = "page_size=16, dim=256", "compute_dtype='fp8'"


def run_sanitizer(tool, options, *arguments, config=""):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at::", *arguments]
    command += [
        sys.executable,
        "-c",
        CODE.format(options=options if "dim=" in options else f"{options}, dim=128", config=config),
    ]
    # PyTorch's allocator would hide an access past a tensor inside a block of its own.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "tool, options, config",
    [
        *(("memcheck", options, "") for options in (BF16_16, BF16_128, E4M3_16)),
        ("memcheck", E4M3_16, FP8),
        ("racecheck", WIDE, ""),
        ("racecheck", f"{WIDE}, kv_dtype=torch.uint8, kv_scales='head'", ""),
    ],
)
def test_a_ragged_paged_batch_is_clean(tool, options, config):
    if config == FP8 and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("products in e4m3 are for Hopper GPUs")
    run = run_sanitizer(tool, options, config=config)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


@pytest.mark.parametrize(
    "name, options, config",
    [
        ("sparse_attention_hopper", BF16_16, ""),
        ("sparse_attention_hopper_e4m3", E4M3_16, ""),
        ("sparse_attention_hopper_fp8", E4M3_16, FP8),
    ],
)
def test_the_hopper_kernels_have_no_race_of_their_own(name, options, config):
    """Racecheck does not follow mbarriers that count bytes, nor the code by which Triton hands work to specialised
    warps, in any kernel that has them. It reports the latter, at the kernel's definition and where its warps part, and
    the hand-over of a pair's number: a store, a warp barrier, then the arrival that the readers wait for. Nothing else
    may be."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    known = (
        f"def _{name}_kernel(",
        "    if _TRITON_3_5:",
        "pair_buffer.",
        "mbarrier.wait(q_ready",
        "mbarrier.wait(q_here",
    )
    expected = {
        f"{file.name}:{number}"
        for file in Path(kernels.__file__).parent.glob("sparse_attention_hopper*.py")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if any(text in line for text in known)
    }
    run = run_sanitizer("racecheck", options, "--racecheck-report", "all", "--print-limit", "100000", config=config)
    assert "RACECHECK SUMMARY" in run.stdout, (run.stdout + run.stderr)[-3000:]
    places = Counter(re.findall(r"(?:Write|Read) Thread .* at .*?\+0x\w+ in (.*)", run.stdout))
    assert places.keys() <= expected, places
