"""`vllm serve` in processes of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request


class Server:
    """One that answers. log: everything its processes wrote, once it is over."""

    def __init__(self, url, model):
        self.url, self.model, self.log = url, model, ""

    def complete(self, prompt, tokens):
        """The text of a greedy answer to token ids."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["text"]

    def metrics(self):
        return urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()


@contextlib.contextmanager
def served(model, env, *arguments, log_file):
    """Start it, wait for it, and end it.

    Args:
        log_file: a path for what it writes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", model)
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port), *arguments],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(600):
                assert process.poll() is None, log_file.read_text()
                try:
                    urllib.request.urlopen(f"{server.url}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(1)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            server.log = log_file.read_text()
