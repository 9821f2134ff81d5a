"""The commands of the pages, and that a wrong one is seen."""

import pytest

from tools import commands

CODES = [code for page in commands.pages() for code in commands.codes(page)]


@pytest.mark.parametrize("page", sorted({code.page for code in CODES}))
def test_the_commands_of_each_page(page):
    assert not [(code.text, fault) for code in CODES if code.page == page for fault in commands.faults(code)]


def test_the_front_page_has_what_a_user_runs_first():
    found = [code.text for code in CODES if code.page == "README.md"]
    for start in (
        "pip install .",
        "make demo",
        "make test",
        "python -m vllm_flashprefill",
        "FLASHPREFILL=1 vllm serve",
    ):
        assert any(text.startswith(start) for text in found), start


WRONG = {
    "make dema": "make has no dema",
    "python scripts/generat.py": "there is no scripts/generat.py",
    "python scripts/generate.py --lengthen 3": "scripts/generate.py has no --lengthen",
    "python -m evaluation --set default": "evaluation has no --set",
    "python -m benchmarks.bench_nothing": "No module named",
    "python -m no_such_package": "there is no module no_such_package",
    "pip install -r requirements/no.txt": "there is no requirements/no.txt",
    "scripts/no.sh": "there is no scripts/no.sh",
    "FLASHPREFILL=yes vllm serve MODEL": "must be 0 or 1",
    "FLASHPREFILL_ALPA=1 vllm serve MODEL": "unknown environment variable",
    """vllm serve M --additional-config '{"flashprefill": {"alhpa": 1}}'""": "unknown option",
    "frobnicate README.md": "frobnicate is not known here",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_seen(line):
    (fault,) = commands.faults(commands.Code("page", "sh", line))
    assert WRONG[line] in fault


def test_what_follows_two_dashes_is_no_option():
    assert commands.faults(commands.Code("page", "sh", "python -m evaluation --model M -- --of-another")) == []


def test_wrong_python_is_seen():
    def said(text):
        return commands.faults(commands.Code("page", "python", text))

    assert said("from vllm_flashprefill.api import flash_refill") == ["vllm_flashprefill.api has no flash_refill"]
    assert said("from vllm_flashprefill.patches import patch_loader_vllm_0_1_0") != []
    assert "never closed" in said("print(")[0]
    assert said("import math\nraise ValueError('was run')") == ["was run"]
    assert said("import vllm\nraise ValueError('was run')") == []
    assert said("from vllm_flashprefill.patches import patch_loader_vllm_0_12_0") == []


def test_what_a_page_is_read_as(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `make  demo` or `not a command`.\n\n```\n# a comment\nmake \\\n    test  # all\n```\n\n"
        "1. indented:\n   ```python\n   import math\n   ```\n\n```text\npython -m of_another_time\n```\n"
    )
    assert [(code.language, code.text.split()) for code in commands.codes(page)] == [
        ("sh", ["make", "test", "#", "all"]),
        ("python", ["import", "math"]),
        ("sh", ["make", "demo"]),
    ]
