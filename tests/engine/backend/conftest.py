import pytest

from tests.support.attention import plain_kernels
from tests.support.vllm_side import recorded_forward
from vllm_flashprefill import counters
from vllm_flashprefill.backend.device_counts import device_counts


@pytest.fixture(scope="session", autouse=True)
def model():
    """No model is needed here."""


@pytest.fixture(autouse=True)
def own_counters(monkeypatch):
    """Engines that other tests start in this process make theirs, and other tests' counts are none of these."""
    monkeypatch.setattr(counters, "_recorder", None)
    device_counts.cache_clear()


@pytest.fixture(scope="module")
def calls():
    """Arguments by name of each call of vLLM's own `forward`."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    with plain_kernels(), recorded_forward(FlashAttentionImpl) as calls:
        yield calls
