"""`python -m vllm_flashprefill --model` beside what this vLLM configures."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import MODEL, ROOT


@pytest.fixture
def config_alone(tmp_path):
    """A model's folder without weights or tokenizer."""
    shutil.copy(MODEL / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "longest, status, layers, says",
    [
        (8192, 0, "layers 0-29: sparse", ""),
        (4096, 1, "layers 0-29: dense, as all of this engine", "error: nothing would be sparse: prompts of under 4096"),
    ],
)
def test_a_model_that_can_be_sparse_and_one_that_is_too_short(config_alone, longest, status, layers, says):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FLASHPREFILL")}
    command = [sys.executable, "-m", "vllm_flashprefill", "--model", config_alone, "--max-model-len", str(longest)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert layers in done.stdout.splitlines()
    assert "preset for llama with heads of 64: alpha 0.005, piece_size 0" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == status and (not status or errors[0].startswith(says))
