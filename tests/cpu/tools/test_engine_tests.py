import pytest

from tools.engine_tests import outcome


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("===== 47 passed, 3 skipped, 14 warnings in 183.63s (0:03:03) =====", (47, 0, 3)),
        ("1 failed, 2 errors, 9 passed in 5.00s", (9, 3, 0)),
        ("no line of pytest's", (0, 0, 0)),
    ],
)
def test_outcome(line, expected):
    found = outcome(f"tests/x.py .s\n{line}\n")
    assert (found["passed"], found["failed"], found["skipped"]) == expected
