import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

CODE = """
import torch
from kernel_cases import Request, make_batch, sparse_config
from vllm_flashprefill.kernels import pipeline
config = sparse_config()
requests = [Request(300, 640, 128), Request(1), Request(129, 511), Request(400)]
batch = make_batch(requests, page_size={page_size}, dim=128, dtype=torch.bfloat16, device="cuda", config=config)
out = torch.full_like(batch.q, torch.nan)
pipeline.run_stages(
    batch.q, batch.k, batch.v, batch.schedule,
    config=config, softmax_scale=0.125, out=out, block_table=batch.block_table,
)
assert not out.isnan().any()
"""


# Pages of 128 take the Gluon kernel on Hopper. Racecheck reports races in the code by which Triton hands work to
# specialised warps, in any kernel that has them.
@pytest.mark.parametrize(("tool", "page_size"), [("memcheck", 16), ("memcheck", 128), ("racecheck", 16)])
def test_a_ragged_paged_batch_is_clean(tool, page_size):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at::"]
    command += [sys.executable, "-c", CODE.format(page_size=page_size)]
    # PyTorch's allocator would hide an access past a tensor inside a block of its own.
    env = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
