"""A loader and the variable alone, each with the engine core in its own process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from packaging.version import Version

from tests.support import MODEL
from tests.support.engines import environment, flashprefill_metrics, run_engine
from tests.support.registered import VERSION


def test_a_loader_makes_the_engines_own_process_sparse(text_ids):
    results, log = run_engine(
        [[(text_ids[:1500], 2)], [(text_ids[:60], 2)]],
        env={
            "FLASHPREFILL_MIN_SPARSE_TOKENS": "1024",
            "FLASHPREFILL_NUM_DENSE_LAYERS": "3",
            "FLASHPREFILL_LOG_STATS": "0.1",
        },
    )
    long, short = (result["stats"] for result in results)
    assert long["sparse_tokens"] == 27 * 1500
    assert long["dense_tokens"] == {"dense_layer": 3 * 1501, "decode": 27}
    assert short["dense_tokens"] == {"dense_layer": 3 * 61, "short_prompt": 27 * 60, "decode": 27}
    assert "num_dense_layers=3" in log
    assert "FlashPrefill: density" in log
    assert "short_prompt" in log


def test_vllm_serve_with_the_variable_alone(text_ids):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = os.path.join(os.path.dirname(sys.executable), "vllm")
    env = environment(FLASHPREFILL="1", FLASHPREFILL_ALPHA="0.9", FLASHPREFILL_LOG_STATS="0.1")
    options = json.dumps({"flashprefill": {"alpha": 0.2, "min_sparse_tokens": 1024}})
    command = [vllm, "serve", str(MODEL), "--enforce-eager", "--port", str(port), "--max-model-len", "4096"]
    command += ["--max-num-batched-tokens", "2048", "--max-num-seqs", "16", "--additional-config", options]
    command += ["--dtype", "float32"]
    if Version(VERSION) >= Version("0.14"):
        command += ["--attention-backend", "CUSTOM"]
    server = subprocess.Popen(
        command,
        cwd="/",
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, server.stdout.read()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        body = json.dumps({"model": str(MODEL), "prompt": text_ids[:1500], "max_tokens": 2, "temperature": 0})
        request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        assert answer["usage"]["prompt_tokens"] == 1500
        scraped = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            log = server.communicate(timeout=30)[0]
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            log = server.communicate()[0]
    assert "FlashPrefillConfig(alpha=0.2, " in log
    assert "FlashPrefill: density" in log
    assert "vllm:prompt_tokens_total" in scraped
    counted = flashprefill_metrics(scraped)
    assert counted["sparse_tokens_total"] == 30 * 1500
    assert {name: value for name, value in counted.items() if "reason" in name} == {
        'dense_tokens_total{reason="decode"}': 30
    }
    assert 0 < counted["kept_blocks_total"] < counted["visible_blocks_total"]
    assert counted["density"] == counted["kept_blocks_total"] / counted["visible_blocks_total"]
    assert counted["selection_seconds_total"] > 0
    assert counted["attention_seconds_total"] > 0
