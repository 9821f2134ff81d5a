import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout


def test_a_wheel_works_from_an_empty_folder(tmp_path):
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(site)
    assert tops == {"vllm_flashprefill", f"{wheel.name.split('-py3')[0]}.dist-info"}, "nothing global but the package"

    out = run(
        "import vllm_flashprefill, importlib.metadata as metadata\n"
        "(entry,) = metadata.entry_points(group='vllm.general_plugins', name='flashprefill')\n"
        "entry.load()()\n"
        "print(vllm_flashprefill.__file__, metadata.version('vllm-flashprefill'))",
        cwd=empty,
        env={"PYTHONPATH": str(site), "PATH": ""},
    )
    assert str(site) in out
    assert out.split()[1] == "0.1.0"
    (metadata,) = site.glob("*.dist-info/METADATA")
    needs = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist:")]
    assert needs == ["Requires-Dist: numpy", "Requires-Dist: packaging"], "no version: none of vLLM's pins is moved"


def test_importing_the_package_loads_neither_torch_nor_vllm():
    out = run("import sys, vllm_flashprefill; print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])")
    assert out.strip() == "[]"


def test_what_needs_no_gpu_needs_no_triton():
    run(
        "import sys; sys.modules['triton'] = None; import vllm_flashprefill.api, vllm_flashprefill.kernels.workspace",
        cwd=ROOT,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_tests_are_skipped_with_a_reason_where_there_is_no_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"^\d+ skipped in", done.stdout, re.MULTILINE) and ": no CUDA GPU" in done.stdout
