import multiprocessing
import os

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
