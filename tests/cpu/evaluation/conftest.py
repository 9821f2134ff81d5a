import pytest

from evaluation import tasks, text
from tests.support.words import Words


@pytest.fixture(scope="module")
def prose():
    return text.prose()


@pytest.fixture(scope="module")
def tokenizer():
    return Words()


@pytest.fixture(scope="module")
def maker(tokenizer, prose):
    return tasks.Maker(tokenizer, prose)
