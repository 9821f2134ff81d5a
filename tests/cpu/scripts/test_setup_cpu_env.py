"""What an environment needs is asked for before anything is downloaded."""

import subprocess

import pytest

from tests.support import ROOT

# A Python that answers one question with no, and everything else with an error that no test expects.
STUB = """#!/bin/sh
case "$*" in *{refused}*) exit 1 ;; -c*) exit 0 ;; -V) echo Python 3.11.2 ;; *) echo "was run: $*" >&2; exit 1 ;; esac
"""


def set_up(tmp_path, version="0.12.0", refused="nothing", **env):
    """A set-up that fails and leaves nothing behind."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(refused=refused))
    stub.chmod(0o755)
    venv = tmp_path / "venv"
    done = subprocess.run(
        [ROOT / "scripts" / "setup_cpu_env.sh", version, venv],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(stub), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not venv.exists()
    return done


@pytest.mark.parametrize(
    "missing, said",
    [
        (dict(version="0.9.0"), "error: no CPU engine for vLLM 0.9.0: there is no requirements/cpu-0.9.0.txt"),
        (dict(PYTHON="no-such-python"), "error: no no-such-python on the PATH; set PYTHON to a Python 3.10 to 3.12"),
        (dict(refused="version_info"), "error: vLLM 0.12.0 needs Python 3.10 to 3.12, "),
        (dict(refused="libnuma"), "error: vLLM's CPU engine needs libnuma.so.1 (Debian: apt install libnuma1)"),
    ],
)
def test_what_is_missing_is_one_line_before_any_download(tmp_path, missing, said):
    (line,) = set_up(tmp_path, **missing).stderr.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("refused", ["Python.h", "nothing"])
def test_what_only_compiling_needs_is_a_warning(tmp_path, refused):
    said = set_up(tmp_path, refused=refused).stdout
    assert ("warning: no Python.h, " in said) == (refused == "Python.h")
