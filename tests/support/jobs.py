"""What tests have done in processes of their own: a JSON job on stdin, a line with the result among what is written."""

import json
import subprocess
import sys

from tests.support import ROOT

RESULT = "RESULT "


class Failed(Exception):
    """A process failed; the message is what it wrote."""


def run_job(module, job, env, timeout=600, cwd=ROOT):
    """Run a module of tests.support; returns (its result, everything the processes wrote)."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}"],
        cwd=cwd, env=env, input=json.dumps(job), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise Failed(log)
    (result,) = (line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(result), log


def finish(result):
    print("\n" + RESULT + json.dumps(result), flush=True)
