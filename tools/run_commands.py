"""Run the commands that the pages tell to run: `python -m tools.run_commands MODEL [PAGE ...]`.

Takes the shell commands of fenced blocks, as tools/commands.py reads them, and runs them one after the other in a copy
of the checkout, with a model's folder for MODEL and a text for FILE. It takes minutes and starts engines. A server runs
until the next command that is not curl. What needs a GPU or makes an environment is named and left out. Exits with 1
after what a command that failed said last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from scripts.generate import documentation
from tools.commands import ROOT, Code, codes, pages

LEFT_OUT = {
    r"^(make|apt|pip) |setup_cpu_env|fetch_model|^\.venv": "makes an environment, or needs another one",
    r"\bray\b|test_ray": "needs Ray and its nodes",
    r"--data-parallel-size": "needs two GPUs; tests/engine/test_data_parallel.py runs it on a CPU",
    r"tests/gpu|research\.estimates|-m evaluation|\b32000\b": "needs a GPU, or hours",
}
HEALTH = "http://127.0.0.1:8000/health"
# For one command, or for a server's start.
SECONDS = 1800


def reason_left_out(line: str) -> str | None:
    return next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, line)), None)


@contextlib.contextmanager
def copied_checkout() -> Iterator[Path]:
    """A copy of what git knows of the checkout, with its models, that goes again."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in filter(None, listed.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        (copy / "models").symlink_to(ROOT / "models")
        yield copy


def run_all(lines: list[Code], model: str) -> Iterator[tuple[Code, str]]:
    """Run them in a copy of the checkout; what is wrong with them.

    Yields:
        A command and how it ended, where that was not well.
    """
    server = None
    with copied_checkout() as folder:
        text = folder / "text.txt"
        text.write_text(documentation())
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
        }
        try:
            for code in lines:
                line = re.sub(r"\bFILE\b", str(text), re.sub(r"\bMODEL\b", model, code.text))
                if reason := reason_left_out(line):
                    print(f"left out, {reason}: {code.text}", flush=True)
                    continue
                started = time.monotonic()
                if " serve " in line:
                    stop(server)
                    server, log = start(line, folder, env)
                    fault = "" if is_ready(server) else f"did not serve:\n{last_lines(log.read_text())}"
                else:
                    if not line.startswith("curl "):
                        server = stop(server)
                    fault = ended(line, folder, env)
                print(f"{'FAILED' if fault else 'ran'} in {time.monotonic() - started:.0f} s: {line}", flush=True)
                if fault:
                    yield code, fault
        finally:
            stop(server)


def start(line: str, folder: Path, env: dict[str, str]) -> tuple[subprocess.Popen, Path]:
    """A server in a process group of its own, and its log."""
    log = folder / "server.log"
    with log.open("w") as file:
        command = ["bash", "-c", line]
        server = subprocess.Popen(
            command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return server, log


def is_ready(server: subprocess.Popen) -> bool:
    """Wait until it answers; False where it ends, or takes too long."""
    deadline = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(HEALTH, timeout=5).close()
            return True
        time.sleep(1)
    return False


def stop(server: subprocess.Popen | None) -> None:
    if server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def ended(line: str, folder: Path, env: dict[str, str]) -> str:
    """Run a line; empty where it ended well, else how it did not."""
    try:
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {SECONDS} s"
    return f"ended with {done.returncode}:\n{last_lines(done.stdout + done.stderr)}" if done.returncode else ""


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-12:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a small model")
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    found = [code for page in options.pages or pages() for code in codes(page.resolve(), backticks=False)]
    found = [code for code in found if code.language == "sh"]
    wrong = list(run_all(found, str(Path(options.model).resolve())))
    for code, fault in wrong:
        print(f"{code.page}: {code.text}\n{fault}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
