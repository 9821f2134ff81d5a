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

CODE = """
import torch
from tests.support.kernel_cases import make_batch, sparse_config
from tests.support.request import Request
from vllm_flashprefill.kernels import pipeline
config = sparse_config()
requests = [Request(300, 640, 128), Request(1), Request(129, 511), Request(400)]
batch = make_batch(requests, {options}, dim=128, dtype=torch.bfloat16, device="cuda", config=config)
out = torch.full_like(batch.q, torch.nan)
pipeline.run_stages(
    batch.q, batch.kv, batch.schedule, config=config, softmax_scale=0.125, out=out
)
assert not out.isnan().any()
"""


# On Hopper bfloat16 caches take the Gluon kernel, e4m3 ones the Triton kernel.
BF16_16, BF16_128, E4M3_16 = "page_size=16", "page_size=128", "page_size=16, kv_dtype=torch.uint8, kv_scales='head'"


def run_sanitizer(tool, options, *arguments):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at::", *arguments]
    command += [sys.executable, "-c", CODE.format(options=options)]
    # PyTorch's allocator would hide an access past a tensor inside a block of its own.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "tool, options", [("memcheck", o) for o in (BF16_16, BF16_128, E4M3_16)] + [("racecheck", E4M3_16)]
)
def test_a_ragged_paged_batch_is_clean(tool, options):
    run = run_sanitizer(tool, options)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


def test_the_hopper_kernel_has_no_race_of_its_own():
    """Racecheck does not follow mbarriers that count bytes, nor the code by which Triton hands work to specialised
    warps, in any kernel that has them. It reports the latter, at the kernel's definition and where its warps part, and
    the hand-over of a pair's number: a store, a warp barrier, then the arrival that the readers wait for. Nothing else
    may be."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    from vllm_flashprefill.kernels import sparse_attention_hopper as module

    file = Path(module.__file__)
    name = module._sparse_attention_hopper_kernel.__name__
    known = (f"def {name}(", "    if _TRITON_3_5:", "pair_buffer.", "mbarrier.wait(q_ready")
    source = enumerate(file.read_text().splitlines(), start=1)
    expected = {f"{file.name}:{number}" for number, line in source if any(text in line for text in known)}
    run = run_sanitizer("racecheck", BF16_16, "--racecheck-report", "all", "--print-limit", "100000")
    assert "RACECHECK SUMMARY" in run.stdout, (run.stdout + run.stderr)[-3000:]
    places = Counter(re.findall(r"(?:Write|Read) Thread .* at .*?\+0x\w+ in (.*)", run.stdout))
    assert places.keys() <= expected, places
