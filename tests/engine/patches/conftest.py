import pytest

import vllm_flashprefill


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    # Undone after the revert, which puts back the variables that a test had set.
    yield
    vllm_flashprefill.revert()
