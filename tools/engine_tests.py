"""Run the tests of one vLLM's CPU engine, in an environment made for it, and append a row to results/versions.csv.

    python -m tools.engine_tests 0.28.0
    python -m tools.engine_tests --here --kind "NVIDIA H100" -- tests/gpu/test_engine.py tests/gpu/backend

The second runs the given tests in this Python's environment, on a GPU for example.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.rows import RESULTS, append_row, commit_name

ROOT = Path(__file__).parents[1]


def outcome(log: str) -> dict[str, int]:
    """How many tests passed, failed (errors among them) and were skipped, by the last line of pytest's that says so."""
    summary = ([line for line in log.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)] or [""])[-1]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    return {
        "passed": found.get("passed", 0),
        "failed": found.get("failed", 0) + found.get("error", 0),
        "skipped": found.get("skipped", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="one that requirements/ has a cpu-*.txt for")
    parser.add_argument("--here", action="store_true", help="in this Python's environment, whatever its vLLM is")
    parser.add_argument("--kind", default="CPU engine", help="what the row says it ran on")
    parser.add_argument("--commit", help="what the row says of the code; else $COMMIT, else git's")
    parser.add_argument("tests", nargs="*", help="after --; tests/engine if none are named")
    args = parser.parse_args()
    if args.here == bool(args.version):
        if not args.here:
            parser.error("name a version, or --here")
        args.tests.insert(0, args.version)
    python = sys.executable
    if not args.here:
        venv = ROOT / f".venv-{args.version}"
        subprocess.run([ROOT / "scripts/setup_cpu_env.sh", args.version, venv], check=True)
        python = str(venv / "bin/python")
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    # An engine is several processes, each of which would compile torch and vLLM again.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    version = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('vllm'))"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.strip()  # fmt: skip
    started = datetime.datetime.now(datetime.timezone.utc)
    command = [python, "-m", "pytest", "-rs", "--timeout", "1800", *(args.tests or ["tests/engine"])]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as run:
        log = []
        for line in run.stdout:
            print(line, end="", flush=True)
            log.append(line)
    seconds = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
    row = {
        "date": f"{started:%Y-%m-%d}",
        "vllm": re.match(r"[\d.]+\d", version).group().removesuffix(".post2"),
        "kind": args.kind,
        "commit": commit_name(args.commit),
        "tests": " ".join(args.tests) or "tests/engine",
        **outcome("".join(log)),
        "minutes": f"{seconds / 60:.0f}",
    }
    append_row(RESULTS / "versions.csv", row)
    print(row)
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
