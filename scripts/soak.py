"""Soak `vllm serve` with FlashPrefill: mixed lengths, streams, cancellations and clients that hang up.

Starts the server, sends the requests, asks /health all the time, and compares before and after: the GPU memory that
is in use, and the answer to one prompt. Ends with status 1 where a request failed, /health did not answer, memory
grew, the answer changed or the server logged an error.

    python scripts/soak.py --requests 1000                      SmolLM2-135M on this machine's GPU
    python scripts/soak.py --model PATH --longest 100000 -- --tensor-parallel-size 2
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from generate import MODEL

HEALTH_TIMEOUT_S = 5.0
# Pools grow while new batch shapes appear; a leak would grow with every request.
MEMORY_SLACK_MB = 300


def text(length: int, seed: int) -> str:
    """About `length` tokens of English."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    start = random.Random(seed).randrange(len(whole))
    # Some four characters a token; three keep a prompt within the model's length.
    return (whole[start:] + whole * (1 + 3 * length // len(whole)))[: 3 * length]


class Soak:
    def __init__(self, session, model: str, longest: int):
        self.session, self.model, self.longest = session, model, longest
        self.outcomes: Counter[str] = Counter()
        self.unhealthy = 0

    async def request(self, number: int) -> None:
        import aiohttp

        generator = random.Random(number)
        length = int(2 ** generator.uniform(2, generator.uniform(4, len(bin(self.longest)) - 2.1)))
        kind = generator.choices(["whole", "stream", "hang up early", "hang up late"], [4, 4, 1, 1])[0]
        body = dict(
            model=self.model, prompt=text(min(length, self.longest), number), max_tokens=generator.randint(1, 64),
            temperature=0, stream=kind != "whole", ignore_eos=True,
        )  # fmt: skip
        try:
            if kind == "hang up early":
                await asyncio.wait_for(self._post(body, chunks=None), generator.uniform(0.001, 0.3))
            else:
                await self._post(body, chunks=generator.randint(1, 5) if kind == "hang up late" else None)
            self.outcomes[kind] += 1
        except asyncio.TimeoutError:
            self.outcomes[kind] += 1
        except (aiohttp.ClientError, RuntimeError) as error:
            self.outcomes[f"failed: {type(error).__name__}: {str(error)[:100]}"] += 1

    async def _post(self, body: dict, chunks: int | None) -> str:
        """The answer's text, or that of its first chunks, after which the client hangs up."""
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {(await response.text())[:200]}")
            if not body["stream"]:
                return (await response.json())["choices"][0]["text"]
            lines = []
            async for line in response.content:
                lines.append(line.decode())
                if chunks is not None and len(lines) >= 2 * chunks:
                    break
            return "".join(lines)

    async def answer(self) -> str:
        body = dict(model=self.model, prompt=text(self.longest // 2, 0), max_tokens=16, temperature=0, stream=False)
        return await self._post(body, chunks=None)

    async def watch_health(self) -> None:
        import aiohttp

        while True:
            try:
                async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)) as r:
                    self.unhealthy += r.status != 200
            except (asyncio.TimeoutError, aiohttp.ClientError):
                self.unhealthy += 1
            await asyncio.sleep(0.5)


def gpu_memory_mb() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


async def soak(url: str, args: argparse.Namespace, server: subprocess.Popen) -> list[str]:
    import aiohttp
    from tqdm import tqdm

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        started = time.monotonic()
        while True:
            if server.poll() is not None:
                return [f"the server ended with status {server.returncode} before it was ready"]
            try:
                async with session.get("/health") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
        print(f"server ready after {time.monotonic() - started:.0f} s", flush=True)

        run = Soak(session, str(args.model), args.longest)
        limit = asyncio.Semaphore(args.concurrency)
        bar = tqdm(total=args.requests, unit="request", mininterval=2)

        async def one(number: int) -> None:
            async with limit:
                await run.request(number)
                bar.update()

        # A first part of the load, so that what is kept for every batch shape is there.
        await asyncio.gather(*(run.request(-number) for number in range(1, 40)))
        first = await run.answer()
        before = gpu_memory_mb()
        run.outcomes.clear()
        health = asyncio.create_task(run.watch_health())
        await asyncio.gather(*(one(number) for number in range(args.requests)))
        bar.close()
        last = await run.answer()
        await asyncio.sleep(1)
        after = gpu_memory_mb()
        health.cancel()
        async with session.get("/metrics") as response:
            wanted = r"^(vllm:(?:num_requests_(?:running|waiting)|flashprefill)\S*) (\S+)"
            metrics = re.findall(wanted, await response.text(), re.M)

    print(f"outcomes: {dict(run.outcomes)}")
    print(f"GPU memory: {before} MB before, {after} MB after; /health unanswered {run.unhealthy} times")
    for name, value in metrics:
        print(f"{name} {value}")
    failed = sum(n for kind, n in run.outcomes.items() if kind.startswith("failed"))
    busy = [name for name, value in metrics if "num_requests" in name and float(value)]
    wrong = []
    if failed:
        wrong.append(f"{failed} requests failed")
    if run.unhealthy:
        wrong.append(f"/health did not answer {run.unhealthy} times")
    if after > before + MEMORY_SLACK_MB:
        wrong.append(f"GPU memory grew from {before} to {after} MB")
    if first != last:
        wrong.append(f"the same prompt was answered {first!r} before and {last!r} after")
    if busy:
        wrong.append(f"requests are left in the engine: {busy}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--longest", type=int, default=7000, help="tokens of the longest prompt")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("serve", nargs="*", help="further arguments of vllm serve, after --")
    args = parser.parse_args()

    log = Path(tempfile.mkdtemp(prefix="flashprefill-soak-"), "server.log")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(args.model), "--port", str(args.port)]
    with log.open("w") as file:
        environment = {**os.environ, "FLASHPREFILL": "1", "FLASHPREFILL_LOG_STATS": "1"}
        server = subprocess.Popen([*command, *args.serve], stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            wrong = asyncio.run(soak(f"http://127.0.0.1:{args.port}", args, server))
        finally:
            server.terminate()
            server.wait(60)
    lines = log.read_text().splitlines()
    errors = [line for line in lines if re.search(r"\bERROR\b|Traceback", line)]
    if errors:
        wrong.append(f"the server logged {len(errors)} errors, the first: {errors[0]}")
    print("\n".join(line for line in lines if "FlashPrefill" in line)[-1500:])
    print(f"server log: {log}")
    if wrong:
        sys.exit("\n".join(wrong))
    print("passed")


if __name__ == "__main__":
    main()
