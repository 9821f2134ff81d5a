import os

import pytest


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    from vllm_flashprefill import hf

    for name in [name for name in os.environ if name.startswith("FLASHPREFILL_")]:
        monkeypatch.delenv(name)
    yield
    hf.unregister()
