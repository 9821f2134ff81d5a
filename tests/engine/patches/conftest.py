import pytest

import vllm_flashprefill


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    vllm_flashprefill.revert()
