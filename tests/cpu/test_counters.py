import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flashprefill import counters
from vllm_flashprefill.routing import DenseReason


def work():
    counters.recorder().add_sparse(100, kept_blocks=30, visible_blocks=60, selection=0.5, attention=1.5)
    counters.recorder().add_dense(DenseReason.DECODE, 7)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_counters_of_all_processes_add_up(shared_stats, method):
    work()
    child = multiprocessing.get_context(method).Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(os.listdir(shared_stats)) == 2, "each process has a file of its own"
    total = counters.read_stats()
    assert (total.sparse_tokens, total.kept_blocks, total.visible_blocks) == (200, 60, 120)
    assert total.dense_tokens == {"decode": 14}
    assert (total.selection_seconds, total.attention_seconds) == (1.0, 3.0)
    assert total.density == 0.5


# What an API server does as far as counters go, its engine within it.
SERVER = """
import json, os, sys
from vllm_flashprefill import counters
from vllm_flashprefill.routing import DenseReason
counters.share_stats()
sys.stdin.readline()
counters.recorder().add_dense(DenseReason.DECODE, int(sys.argv[1]))
print(json.dumps([os.environ["FLASHPREFILL_STATS_DIR"], counters.read_stats().dense_tokens]))
"""


def start_server(tokens):
    command = [sys.executable, "-c", SERVER, str(tokens)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_servers_of_one_launcher_count_for_themselves(shared_stats):
    work()
    servers = [start_server(tokens) for tokens in (3, 5)]
    answers = [json.loads(server.communicate("go\n")[0]) for server in servers]
    assert [counted for _, counted in answers] == [{"decode": 3}, {"decode": 5}]
    assert len({shared_stats, *(folder for folder, _ in answers)}) == 3
    assert not any(os.path.exists(folder) for folder, _ in answers), "they go when their server ends"
    assert counters.read_stats().dense_tokens == {"decode": 7}


def serve(tokens, results):
    counters.share_stats()
    counters.recorder().add_dense(DenseReason.DECODE, tokens)
    results.put((os.environ["FLASHPREFILL_STATS_DIR"], counters.read_stats().dense_tokens))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_servers_started_by_multiprocessing_count_for_themselves(nothing_shared, method):
    """A launcher that registers and starts no engine of its own has no folder that they could inherit."""
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    for tokens in (3, 5):
        server = context.Process(target=serve, args=(tokens, results))
        server.start()
        server.join()
        folder, counted = results.get()
        assert counted == {"decode": tokens}
        assert not os.path.exists(folder), "it goes when its server ends"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_servers_of_a_parent_with_an_engine_count_for_themselves(shared_stats, method):
    work()
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    servers = [context.Process(target=serve, args=(tokens, results)) for tokens in (3, 5)]
    for server in servers:
        server.start()
        server.join()
    answers = [results.get() for _ in servers]
    assert [counted for _, counted in answers] == [{"decode": 3}, {"decode": 5}]
    assert len({shared_stats, *(folder for folder, _ in answers)}) == 3
    assert counters.read_stats().dense_tokens == {"decode": 7}


@pytest.mark.parametrize("name", ["ApiServer_1", "EngineCore", "EngineCore_DP0", "VllmWorker-3"])
def test_vllms_own_processes_count_for_their_parents_engine(shared_stats, name):
    work()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=serve, args=(3, results), name=name)
    process.start()
    process.join()
    assert results.get() == (shared_stats, {"decode": 10})
    assert counters.read_stats().dense_tokens == {"decode": 10}


def test_a_server_counts_on_when_its_launcher_has_ended(nothing_shared, tmp_path):
    launcher = f"""
import subprocess, sys
from vllm_flashprefill import counters
counters.share_stats()
subprocess.Popen([sys.executable, "-c", {SERVER!r}, "3"], stdin=0, stdout=open(sys.argv[1], "w"))
"""
    answer = tmp_path / "answer"
    read_end, write_end = os.pipe()
    # Its server waits for a line, and whoever waits for the end of its stderr for the server too.
    ended = subprocess.Popen(
        [sys.executable, "-c", launcher, answer], stdin=read_end, stderr=subprocess.PIPE, text=True
    )
    assert ended.wait() == 0
    os.write(write_end, b"go\n")
    assert ended.stderr.read() == ""
    os.close(read_end), os.close(write_end)
    assert json.loads(answer.read_text())[1] == {"decode": 3}


def test_a_folder_that_is_gone_is_made_anew(shared_stats, monkeypatch):
    os.rmdir(shared_stats)
    counters.share_stats()
    assert os.environ["FLASHPREFILL_STATS_DIR"] != shared_stats
    work()
    assert counters.read_stats().dense_tokens == {"decode": 7}


@pytest.mark.parametrize("gone", ["a file", "the folder"])
def test_what_goes_while_it_is_read_is_left_out(shared_stats, monkeypatch, gone):
    work()
    before = counters.read_stats()
    if gone == "a file":
        os.symlink("nowhere", Path(shared_stats) / "1.f64")
        (Path(shared_stats) / "2.f64").write_bytes(b"12345")
        assert counters.read_stats() == before
        return

    def listed(path):
        raise FileNotFoundError(path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, listed)
    assert counters.read_stats() == counters.Stats()


@pytest.fixture
def warnings(monkeypatch):
    warnings = []
    monkeypatch.setattr(counters.logger, "warning", lambda text, *values: warnings.append(text % values))
    return warnings


@pytest.mark.parametrize("trouble", ["full", "not writable", "gone", "no folder", "not mapped", "mapped too short"])
def test_without_a_file_a_process_counts_for_itself(shared_stats, warnings, trouble, monkeypatch):
    if trouble == "not writable":
        (Path(shared_stats) / f"{os.getpid()}.f64").mkdir()
    elif trouble in ("gone", "no folder"):
        os.rmdir(shared_stats)
    if trouble == "no folder":
        Path(shared_stats).touch()
    if "mapped" in trouble:

        def memmap(*args, **kwargs):
            raise OSError(19, "No such device") if trouble == "not mapped" else ValueError("mmap length is greater")

        monkeypatch.setattr(counters.np, "memmap", memmap)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if trouble == "full" else limits[0], limits[1]))
    try:
        work()
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warnings) == 1 and "no file for the counters" in warnings[0], warnings
    total = counters.read_stats()
    assert (total.sparse_tokens, total.dense_tokens) == (200, {"decode": 14})
    if trouble == "no folder":
        os.remove(shared_stats)


def test_without_a_folder_a_process_counts_for_itself(nothing_shared, warnings, monkeypatch):
    def none(*args, **kwargs):
        raise FileNotFoundError(2, "No usable temporary directory found")

    counters._warn_no_folder.cache_clear()
    monkeypatch.setattr(counters.tempfile, "mkdtemp", none)
    monkeypatch.setenv("FLASHPREFILL_STATS_DIR", "/nowhere")
    # As when an engine is configured, and again when it starts.
    counters.share_stats()
    counters.share_stats()
    work()
    assert len(warnings) == 1 and "No usable temporary directory" in warnings[0], warnings
    assert counters.read_stats().dense_tokens == {"decode": 7}


def test_a_child_without_a_folder_says_so(nothing_shared, monkeypatch):
    """A process without may be an engine within this one, which reads its own counters; nothing reads a child's."""
    context = multiprocessing.get_context("fork")
    warnings = context.SimpleQueue()
    monkeypatch.setattr(counters.logger, "warning", lambda text, *values: warnings.put(text % values))
    work()
    assert warnings.empty()
    child = context.Process(target=work)
    child.start()
    child.join()
    assert not warnings.empty() and "stats() of other processes do not" in warnings.get()


def test_a_difference_is_what_happened_between(shared_stats):
    work()
    before = counters.read_stats()
    counters.recorder().add_dense(DenseReason.SHORT_PROMPT, 5)
    after = counters.read_stats() - before
    assert after == counters.Stats(dense_tokens={"short_prompt": 5})
    assert after.density is None


def test_nothing_registered_is_nothing_counted(monkeypatch):
    monkeypatch.delenv("FLASHPREFILL_STATS_DIR", raising=False)
    assert counters.read_stats() == counters.Stats()


def test_what_the_log_says(shared_stats):
    work()
    assert str(counters.read_stats()) == (
        "density 50.0%, sparse 93.5% of 107 layer-tokens, selection 0.50 s, attention 1.50 s, dense: decode 7"
    )


def test_the_log_comes_at_intervals(shared_stats, monkeypatch):
    lines = []
    now = [0.0]
    monkeypatch.setenv("FLASHPREFILL_LOG_STATS", "5")
    monkeypatch.setattr(counters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(counters.logger, "info", lambda text, *values: lines.append(text % values))
    for second in (1, 6, 7, 12, 18):
        now[0] = second
        if second < 12:
            work()
        counters.recorder().step_done()
    assert len(lines) == 2, lines
    assert "of 214 layer-tokens" in lines[0]
    assert "of 107 layer-tokens" in lines[1]
