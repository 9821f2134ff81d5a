"""Soak `vllm serve` with FlashPrefill: mixed lengths, shared prefixes, streams, and clients that hang up.

Starts the server, sends the requests and asks /health all the time. Memory is compared from the first fifth of the
requests to the end, and so is the answer to one prompt, asked of an idle server and out of reach of its prefix cache.
Ends with status 1 where a request failed, /health did not answer, memory grew, the answer changed, nothing was sparse
or the server logged an error; appends a row to a CSV in any case.

    python -m benchmarks.soak                                      SmolLM2-135M on this machine's GPU
    python -m benchmarks.soak --model PATH --longest 100000 -- --tensor-parallel-size 2
    python -m benchmarks.soak --requests 50 --concurrency 8 --longest 6000 -- --enforce-eager     a CPU engine
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from scripts.generate import MODEL, documentation
from tools.rows import RESULTS, append_row, commit_name

READY_TIMEOUT_S = 900
REQUEST_TIMEOUT_S = 300
HEALTH_TIMEOUT_S = 5
IDLE_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
MOST_FAILURES = 20
# Pools grow while new batch shapes appear; a leak would grow with every request.
GPU_SLACK_MB = 300
HOST_SLACK_MB = 500
# Half of the prompts start at one of these many places, so that they share prefixes.
SHARED_STARTS = 16


def filler_tokens(model: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).encode(documentation(), add_special_tokens=False, verbose=False)


class Soak:
    def __init__(self, session: aiohttp.ClientSession, args: argparse.Namespace):
        self.session, self.args = session, args
        self.filler = filler_tokens(args.model)
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cancelled = 0
        self.health_checks = self.health_failures = 0
        self.slowest_health_s = 0.0

    async def run(self, server_pid: int) -> dict[str, Any]:
        """Sends all requests; what was measured at two moments at which the server was idle."""
        from tqdm import tqdm

        limit = asyncio.Semaphore(self.args.concurrency)
        with tqdm(total=self.args.requests, unit="request", mininterval=5) as bar:

            async def one(number: int) -> None:
                async with limit:
                    if self.failed.total() < MOST_FAILURES:
                        await self.request(number)
                    bar.update()

            first = self.args.requests // 5
            await asyncio.gather(*(one(number) for number in range(first)))
            await self.idle()
            answers = [await self.answer(), await self.answer()]
            memory = [(gpu_memory_mb(), host_memory_mb(server_pid))]
            await asyncio.gather(*(one(number) for number in range(first, self.args.requests)))
        busy = await self.idle()
        answers.append(await self.answer())
        memory.append((gpu_memory_mb(), host_memory_mb(server_pid)))
        return {"answers": answers, "memory": memory, "busy": busy, "metrics": await self.metrics()}

    async def request(self, number: int) -> None:
        generator = random.Random(number)
        kind = generator.choices(["whole", "stream", "hang up early", "hang up late"], [4, 4, 1, 1])[0]
        length = int(2 ** generator.uniform(2, math.log2(self.args.longest)))
        start = generator.randrange(len(self.filler))
        if generator.random() < 0.5:
            start = start % SHARED_STARTS * len(self.filler) // SHARED_STARTS
        body = self.body(start, length, max_tokens=generator.randint(1, 64), stream=kind != "whole")
        hang_up_s = generator.uniform(0.001, 0.3) if kind == "hang up early" else None
        hang_up_chunks = generator.randint(1, 5) if kind == "hang up late" else None
        try:
            text = await asyncio.wait_for(self.complete(body, hang_up_chunks), hang_up_s)
            self.cancelled += text is None
            self.done[kind] += 1
        except (asyncio.TimeoutError, aiohttp.ClientError, RuntimeError) as error:
            if hang_up_s and isinstance(error, asyncio.TimeoutError):
                self.cancelled += 1
                self.done[kind] += 1
            else:
                self.failed[f"{kind}: {type(error).__name__}: {str(error)[:200]}"] += 1

    def body(self, start: int, length: int, **more: Any) -> dict[str, Any]:
        prompt = list(itertools.islice(itertools.cycle(self.filler), start, start + length))
        return dict(model=self.args.model, prompt=prompt, temperature=0, ignore_eos=True, **more)

    async def complete(self, body: dict[str, Any], hang_up_chunks: int | None = None) -> str | None:
        """The answer's text; None where the client hung up after so many chunks of it."""
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            if not body["stream"]:
                answer = await response.json()
                if answer["usage"]["completion_tokens"] != body["max_tokens"]:
                    raise RuntimeError(f"{answer['usage']} of {body['max_tokens']} tokens")
                return answer["choices"][0]["text"]
            texts: list[str] = []
            async for line in response.content:
                data = line.decode().removeprefix("data:").strip()
                if data == "[DONE]":
                    return "".join(texts)
                if not data:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(data)
                texts.append(chunk["choices"][0]["text"])
                if len(texts) == hang_up_chunks:
                    response.close()
                    return None
            raise RuntimeError("the stream ended before its [DONE]")

    async def answer(self) -> str:
        """What the longest prompt gets. A salt of its own keeps it from the prefix cache: all of it is computed."""
        salt = str(time.monotonic_ns())
        return await self.complete(self.body(0, self.args.longest, max_tokens=32, stream=False, cache_salt=salt))

    async def watch_health(self) -> None:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        while True:
            started = time.monotonic()
            try:
                async with self.session.get("/health", timeout=timeout) as response:
                    answered = response.status == 200
            except (asyncio.TimeoutError, aiohttp.ClientError):
                answered = False
            self.health_checks += 1
            self.health_failures += not answered
            self.slowest_health_s = max(self.slowest_health_s, time.monotonic() - started)
            await asyncio.sleep(0.5)

    async def metrics(self) -> dict[str, float]:
        wanted = ("num_requests_running", "num_requests_waiting{", "num_preemptions", "request_success", "flashprefill")
        async with self.session.get("/metrics") as response:
            lines = re.findall(r"^vllm:(\S+) (\S+)$", await response.text(), re.M)
        return {name: float(value) for name, value in lines if name.startswith(wanted) and "_created" not in name}

    async def idle(self) -> int:
        """Waits until no request is left in the engine; how many are after a while."""
        for _ in range(IDLE_TIMEOUT_S):
            # Memory is given back and the gauges are set a little after the last answer.
            await asyncio.sleep(1)
            metrics = await self.metrics()
            busy = sum(value for name, value in metrics.items() if name.startswith("num_requests"))
            if not busy:
                break
        return int(busy)


def nvidia_smi(query: str) -> list[str] | None:
    """The answer for each GPU; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.splitlines() if result.returncode == 0 else None


def gpu_memory_mb() -> int | None:
    lines = nvidia_smi("memory.used")
    used = [int(line) for line in lines or [] if line.strip().isdigit()]
    return sum(used) if used else None


def host_memory_mb(pid: int) -> int:
    """Resident memory of a process and all that it started."""
    total = 0
    server = psutil.Process(pid)
    for process in [server, *server.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total >> 20


def log_errors(log: str) -> list[str]:
    """The first line of each error in vLLM's log. Requests that a client aborted are no errors there."""
    lines = [line for line in log.splitlines() if re.search(r"\b(ERROR|CRITICAL)\b|Traceback", line)]
    # vLLM writes a prefix with the place in its source before each line of one message.
    place = [(re.search(r"\[\S+:\d+\]", line) or [line])[0] for line in lines]
    return [line for n, line in enumerate(lines) if not n or place[n] != place[n - 1]]


def metrics_of_flashprefill(metrics: dict[str, float]) -> dict[str, Any]:
    dense = [value for name, value in metrics.items() if name.startswith("flashprefill_dense_tokens_total")]
    density = metrics.get("flashprefill_density")
    return dict(
        sparse_tokens=int(metrics.get("flashprefill_sparse_tokens_total", 0)),
        dense_tokens=int(sum(dense)),
        density=density and round(density, 4),
    )


async def until_ended(server: subprocess.Popen) -> None:
    while server.poll() is None:
        await asyncio.sleep(0.5)


async def until_ready(session: aiohttp.ClientSession) -> None:
    while True:
        try:
            async with session.get("/health", timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)) as response:
                if response.status == 200:
                    return
        except (asyncio.TimeoutError, aiohttp.ClientError):
            pass
        await asyncio.sleep(0.5)


async def unless_ended(work, server: subprocess.Popen, timeout_s: float | None = None) -> Any:
    """The result of `work`; RuntimeError where the server ends first, or after `timeout_s`."""
    task, ended = asyncio.ensure_future(work), asyncio.ensure_future(until_ended(server))
    await asyncio.wait({task, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done() and task.exception():
            # The server's end explains it better, and may be seen a little later.
            await asyncio.wait({ended}, timeout=2)
        if ended.done():
            raise RuntimeError(f"the server ended with status {server.returncode}")
        if not task.done():
            raise RuntimeError(f"not done within {timeout_s} s")
        return task.result()
    finally:
        ended.cancel()
        task.cancel()
        await asyncio.gather(task, ended, return_exceptions=True)


async def soak(url: str, args: argparse.Namespace, server: subprocess.Popen, log: Path) -> tuple[dict, list[str]]:
    """The numbers of the row, and what is wrong."""
    # uvicorn closes an idle connection after five seconds, at times just as a request is sent on it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        started = time.monotonic()
        try:
            await unless_ended(until_ready(session), server, READY_TIMEOUT_S)
        except RuntimeError as error:
            return {}, [f"the server did not get ready: {error}", *log_errors(log.read_text())[-1:]]
        print(f"server ready after {time.monotonic() - started:.0f} s", flush=True)
        async with session.get("/version") as response:
            version = (await response.json())["version"]

        ready_at, started = log.stat().st_size, time.monotonic()
        run = Soak(session, args)
        health = asyncio.ensure_future(run.watch_health())
        found: dict[str, Any] = {}
        wrong = []
        try:
            found = await unless_ended(run.run(server.pid), server)
        except (RuntimeError, asyncio.TimeoutError, aiohttp.ClientError) as error:
            wrong.append(f"stopped after {run.done.total()} requests: {type(error).__name__}: {error}")
        seconds = time.monotonic() - started
        health.cancel()
        errors = log_errors(log.read_bytes()[ready_at:].decode())

    print(f"done: {dict(run.done)}; hung up before the end: {run.cancelled}; failed: {dict(run.failed)}")
    (gpu_before, host_before), (gpu_after, host_after) = found.get("memory", [(None, None)] * 2)
    if found and gpu_before is None:
        print("no GPU: only the memory of the server's processes is compared")
    for name, value in found.get("metrics", {}).items():
        if value:
            print(f"{name} {value:.6g}")

    row = dict(
        vllm=version,
        requests=args.requests,
        concurrency=args.concurrency,
        longest=args.longest,
        seconds=round(seconds, 1),
        cancelled=run.cancelled,
        failed=run.failed.total(),
        health_checks=run.health_checks,
        health_failures=run.health_failures,
        health_slowest_ms=round(1000 * run.slowest_health_s),
        gpu_before_mb=gpu_before,
        gpu_after_mb=gpu_after,
        host_before_mb=host_before,
        host_after_mb=host_after,
        answer=None,
        **metrics_of_flashprefill(found.get("metrics", {})),
    )
    if run.failed:
        wrong.append(f"{run.failed.total()} requests failed, {run.failed.most_common(1)[0][0]}")
    if run.health_failures:
        wrong.append(f"/health did not answer {run.health_failures} times of {run.health_checks}")
    if errors:
        wrong.append(f"the server logged {len(errors)} errors, the first: {errors[0]}")
    if found:
        wrong += wrong_at_end(found, row)
    return row, wrong


def wrong_at_end(found: dict[str, Any], row: dict[str, Any]) -> list[str]:
    wrong = []
    for kind, slack in (("gpu", GPU_SLACK_MB), ("host", HOST_SLACK_MB)):
        before, after = row[f"{kind}_before_mb"], row[f"{kind}_after_mb"]
        if before is not None and after > before + slack:
            wrong.append(f"{kind} memory grew from {before} to {after} MB")
    first, again, last = found["answers"]
    row["answer"] = "not compared" if first != again else "same" if first == last else "changed"
    if first != again:
        print(f"the answer is not compared: the idle server gave {first!r}, and at once {again!r}")
    elif first != last:
        wrong.append(f"the same prompt was answered {first!r} before and {last!r} after")
    if found["busy"]:
        wrong.append(f"{found['busy']} requests are left in the engine")
    if not row["sparse_tokens"]:
        wrong.append("nothing was sparse")
    return wrong


def free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            sys.exit(f"error: port {wanted}: {error.strerror}")
        return probe.getsockname()[1]


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"the server did not stop within {STOP_TIMEOUT_S} s and is killed")
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--longest", type=int, default=7000, help="tokens of the longest prompt")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--csv", type=Path, default=RESULTS / "soak.csv")
    parser.add_argument("serve", nargs="*", help="further arguments of vllm serve, after --")
    args = parser.parse_args()

    if args.model == str(MODEL) and not MODEL.exists():
        sys.exit("error: the model is not there yet; run `make demo`, or scripts/fetch_model.py first")
    port = free_port(args.port)
    log = Path(tempfile.mkdtemp(prefix="flashprefill-soak-"), "server.log")
    print(f"server log: {log}", flush=True)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model]
    command += ["--host", "127.0.0.1", "--port", str(port), *args.serve]
    environment = {**os.environ, "FLASHPREFILL": "1", "FLASHPREFILL_LOG_STATS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            numbers, wrong = asyncio.run(soak(f"http://127.0.0.1:{port}", args, server, log))
        finally:
            stop(server)

    if numbers:
        import torch

        row = dict(
            date=datetime.date.today().isoformat(),
            gpu=(nvidia_smi("name") or ["CPU"])[0],
            vllm=numbers.pop("vllm"),
            torch=torch.__version__,
            commit=commit_name(args.commit),
            model=Path(args.model).name,
            **numbers,
            check="failed" if wrong else "passed",
        )
        append_row(args.csv, row)
        print(row)
    if wrong:
        sys.exit("\n".join(wrong))
    print("passed")


if __name__ == "__main__":
    main()
