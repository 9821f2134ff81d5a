import re

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_flashprefill import counters
from vllm_flashprefill.patches import metrics_endpoint, registration
from vllm_flashprefill.routing import DenseReason


@pytest.fixture(autouse=True)
def shown(shared_stats):
    metrics_endpoint.show()
    yield
    registration.revert()


@pytest.fixture(params=["one API server", "several API servers"])
def registry(request, monkeypatch, tmp_path):
    """What vLLM serves."""
    if request.param == "one API server":
        return REGISTRY
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry


def scrape(registry):
    """The lines of FlashPrefill's in the text that Prometheus gets."""
    return [line for line in generate_latest(registry).decode().splitlines() if "flashprefill" in line]


def samples(registry):
    """{name and labels: value} without the reasons of which there was nothing."""
    found = (line.rpartition(" ") for line in scrape(registry) if not line.startswith("#"))
    return {
        name.removeprefix("vllm:flashprefill_"): float(value)
        for name, _, value in found
        if "reason" not in name or float(value)
    }


def test_what_a_scrape_says(registry):
    counters.recorder().add_sparse(100, kept_blocks=30, visible_blocks=40, selection=0.5, attention=1.5)
    counters.recorder().add_dense(DenseReason.DECODE, 7)
    counters.recorder().add_dense(DenseReason.SHORT_PROMPT, 9)
    assert samples(registry) == {
        "sparse_tokens_total": 100,
        'dense_tokens_total{reason="decode"}': 7,
        'dense_tokens_total{reason="short_prompt"}': 9,
        "kept_blocks_total": 30,
        "visible_blocks_total": 40,
        "density": 0.75,
        "selection_seconds_total": 0.5,
        "attention_seconds_total": 1.5,
    }


def test_each_metric_has_a_type_and_a_meaning(registry):
    described = {}
    for line in scrape(registry):
        if kind := re.fullmatch(r"# (HELP|TYPE) (\S+) (.+)", line):
            described.setdefault(kind[2], {})[kind[1]] = kind[3]
    assert len(described) == 7
    for name, about in described.items():
        assert about["TYPE"] == ("counter" if name.endswith("_total") else "gauge"), name
        assert about["HELP"].endswith("."), name


def test_counters_are_there_before_anything_happened(registry):
    lines = scrape(registry)
    assert "vllm:flashprefill_sparse_tokens_total 0.0" in lines
    for reason in DenseReason:
        assert f'vllm:flashprefill_dense_tokens_total{{reason="{reason.value}"}} 0.0' in lines
    assert not any(line.startswith("vllm:flashprefill_density") for line in lines)


def test_what_a_process_counted_stays_when_it_is_gone(registry):
    counters.recorder().add_sparse(100, kept_blocks=30, visible_blocks=40, selection=0.5, attention=1.5)
    # A new process that happens to get the number of the one that is gone.
    counters._recorder = None
    counters.recorder()
    assert samples(registry)["sparse_tokens_total"] == 100
    counters.recorder().add_sparse(11, kept_blocks=3, visible_blocks=4, selection=0.0, attention=0.0)
    assert samples(registry)["sparse_tokens_total"] == 111


def test_revert_takes_them_away(registry):
    registration.revert()
    assert scrape(registry) == []
    metrics_endpoint.show()
    assert samples(registry)["sparse_tokens_total"] == 0


def test_vllm_does_not_take_them_for_its_own():
    """It unregisters its own by the name that they carry when an engine starts."""
    assert not any(
        hasattr(collector, "_name")
        for collector in REGISTRY._collector_to_names
        if isinstance(collector, metrics_endpoint.StatsCollector)
    )
    assert samples(REGISTRY)
