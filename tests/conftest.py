import os
from unittest import mock

import pytest

from vllm_flashprefill import counters

pytest.register_assert_rewrite("tests.support")


@pytest.fixture(autouse=True)
def own_environment():
    """What a test, or what it calls, sets for its process is gone after it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def nothing_shared(monkeypatch):
    """Counters of this process's own, with no folder yet."""
    monkeypatch.delenv("FLASHPREFILL_STATS_DIR", raising=False)
    monkeypatch.delenv("FLASHPREFILL_LOG_STATS", raising=False)
    monkeypatch.setattr(counters, "_recorder", None)


@pytest.fixture
def shared_stats(nothing_shared):
    """Counters of this test's own; the folder that its processes share them in."""
    counters.share_stats()
    yield os.environ["FLASHPREFILL_STATS_DIR"]
    counters.unshare_stats()
