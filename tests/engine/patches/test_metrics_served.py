"""vLLM's own /metrics and the metrics of an offline engine, without starting either; test_ways_of_use starts one."""

import pytest

import vllm_flashprefill
from tests.support.engines import flashprefill_metrics
from vllm_flashprefill import plugin


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("FLASHPREFILL", "1")


@pytest.mark.parametrize("api_servers", [1, 2])
def test_the_endpoint_as_vllm_mounts_it(api_servers, monkeypatch, tmp_path):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    try:
        from vllm.entrypoints.serve.instrumentator.metrics import attach_router as mount_metrics
    except ImportError:
        from vllm.entrypoints.openai.api_server import mount_metrics

    if api_servers > 1:
        # As vLLM does before it starts them.
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    app = FastAPI()
    mount_metrics(app)
    # With a path behind it, vLLM's second route answers.
    urls = ("/metrics", "/metrics/")
    with TestClient(app) as client:
        for _ in range(2):
            plugin.register()
            for url in urls:
                text = client.get(url).text
                assert flashprefill_metrics(text)["sparse_tokens_total"] == 0, url
                assert text.count("TYPE vllm:flashprefill_sparse_tokens_total") == 1, url
        vllm_flashprefill.revert()
        for url in urls:
            assert flashprefill_metrics(client.get(url).text) == {}, url


def test_metrics_of_an_offline_engine():
    """As `LLM.get_metrics` reads them; vLLM unregisters its own when an engine starts."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.metrics.reader import get_metrics_snapshot

    plugin.register()
    unregister_vllm_metrics()
    values = {metric.name: metric.value for metric in get_metrics_snapshot() if "flashprefill" in metric.name}
    assert values["vllm:flashprefill_sparse_tokens"] == 0
