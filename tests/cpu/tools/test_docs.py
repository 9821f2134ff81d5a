"""What the pages say of other files: tables and plots are those of the rows, and every path they name is there."""

import dataclasses
import re
import subprocess

import pytest

from tests.support.model_kinds import KINDS
from tools import docs, plot, rows
from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.routing import DenseReason

FOLDERS = (
    "benchmarks|docs|evaluation|examples|patches|requirements|research|results|scripts|tests|tools|vllm_flashprefill"
)


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_their_rows(page):
    text = page.read_text(encoding="utf-8")
    assert text == docs.with_tables(text), "run `make docs`"
    assert text.count("<!-- rows: ") == len(docs.PLACE.findall(text)) == text.count("<!-- end -->")


def test_every_table_has_a_place():
    text = "".join(page.read_text(encoding="utf-8") for page in docs.pages())
    assert sorted(name for name, _, _ in docs.PLACE.findall(text)) == sorted(docs.TABLES)


@pytest.mark.parametrize("name", plot.PLOTS)
def test_plots_are_those_of_their_rows(name):
    assert plot.is_current(name, docs.ROOT / name), "run `make docs`"


def test_a_changed_row_shows(monkeypatch):
    name, page = "docs/kernels.png", docs.ROOT / "docs" / "performance.md"
    rows = [{**row, "times_fa2": "9.87"} for row in docs.kernels()]
    monkeypatch.setattr(docs, "kernels", lambda *_: rows)
    monkeypatch.setitem(plot.PLOTS, name, (plot.draw_kernels, lambda: rows))
    assert "| 9.87 |" in docs.with_tables(page.read_text(encoding="utf-8"))
    assert not plot.is_current(name, docs.ROOT / name)


def test_accuracy_has_the_newest_commit_of_each_length_first(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.accuracy() == ""

    def append(**changed):
        row = dict(
            model="M", vllm="1", gpu="GPU", commit="b", tokens=32000, setting="alpha 0.1", density=0.171,
            task="multi-fact", n=240, dense=84.38, sparse=73.9, change=-10.5, low=-15.04, high=-5.8, seed="1",
        )  # fmt: skip
        rows.append_row(tmp_path / "accuracy.csv", {**row, **changed})

    append(commit="a")
    append(task="perplexity", n=2, dense=2.718, sparse=2.7321, change=0.512, low=-0.1, high=1.204)
    append(sparse=1.0)
    append()
    append(task="multi_key", n=60, dense=86.67, density="")
    append(setting="alpha 0.08, piece_size 0", n=120, dense=80)
    append(setting="alpha 0.08, piece_size 0", task="multi_key", n=60, dense=86.67)
    append(tokens=8192, commit="a")
    short, whole, before = docs.accuracy().split("\n\nM, ")
    assert before.startswith("32,000 tokens, vLLM 1, GPU, commit a:")
    assert short.startswith("M, 8,192 tokens, vLLM 1, GPU, commit a:\n\n| task | n | seed | dense | alpha 0.1 |\n|---|")
    cell = "73.9: -10.5 (-15.0 to -5.8) at"
    assert whole.splitlines() == [
        "32,000 tokens, vLLM 1, GPU, commit b:",
        "",
        "| task | n | seed | dense | alpha 0.1 | alpha 0.08, piece_size 0 |",
        "|---|---|---|---|---|---|",
        f"| multi-fact | 240 | 1 | 84.4 | {cell} 17.1 % | |",
        f"| multi-fact | 120 | 1 | 80.0 | | {cell} 17.1 % |",
        f"| multi_key | 60 | 1 | 86.7 | {cell} dense | {cell} 17.1 % |",
        "| perplexity | 2 | 1 | 2.718 | 2.732: +0.51 % (-0.10 to +1.20) at 17.1 % | |",
    ]


README = (docs.ROOT / "README.md").read_text(encoding="utf-8")
# A number with the unit of something measured.
FIGURE = re.compile(r"\d[\d.,]*\s?(%|ms\b|s\b|x\b|times\b|points\b|TFLOP)")


def test_the_front_page_has_no_figure_without_rows():
    written = re.sub(r"```.*?```", "", docs.PLACE.sub("", README), flags=re.DOTALL)
    allowed = {"15 points"}  # how wide the intervals of the table above it are
    assert {found.group() for found in FIGURE.finditer(written)} - allowed == set()
    assert FIGURE.search("speedup of 1.40 times") and FIGURE.search("a loss of 10.4 points, 17 %")


def test_the_front_page_is_short():
    assert README.count("\n") <= 120


def test_the_front_page_has_the_options_and_their_defaults():
    lines = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.partition("\n## Options\n")[2], re.MULTILINE))
    defaults = dataclasses.asdict(FlashPrefillConfig())
    assert lines.keys() == defaults.keys()
    for name, value in defaults.items():
        assert lines[name].removeprefix("preset, else ") == str(value), name


def test_each_reason_is_explained_once():
    reasons = (docs.ROOT / "docs" / "operating.md").read_text(encoding="utf-8").partition("\n## Reasons\n")[2]
    table = re.findall(r"^\| (`.+?`) \|", reasons.partition("\n## ")[0], re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(reason.value for reason in DenseReason)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*docs.pages(), docs.ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


THREE_DIGITS = {"0.01346": "0.0135", "0.4196": "0.420", "2.5": "2.50", "13.27": "13.3", "1823.07": "1823"}


@pytest.mark.parametrize("value", THREE_DIGITS)
def test_three_digits(value):
    assert docs.three_digits(value) == THREE_DIGITS[value]


def test_every_path_that_is_named_is_there():
    """In pages, comments and docstrings; a path of another commit says so."""
    listed = subprocess.run(["git", "ls-files"], cwd=docs.ROOT, capture_output=True, text=True, check=True).stdout
    missing = []
    for name in listed.split():
        if not name.endswith((".md", ".py", ".sh", ".toml", "Makefile")) or name.startswith(("CHANGELOG", "tests/")):
            continue
        text = (docs.ROOT / name).read_text(encoding="utf-8")
        paths = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)(?!\.?\w|-\$|`? of commit)", text)
        modules = re.findall(rf"python -m ((?:{FOLDERS})\b[\w.]*)\b", text)
        for module in modules:
            path = module.replace(".", "/")
            paths.append(f"{path}/__main__.py" if (docs.ROOT / path).is_dir() else f"{path}.py")
        missing += [f"{name}: {path}" for path in paths if not (docs.ROOT / path).exists() and "NAME" not in path]
    assert not missing


def test_the_kinds_of_models_that_a_page_names_are_tested():
    named = re.findall(r"`(\w+)` in `tests/gpu/test_models.py`", (docs.ROOT / "docs/operating.md").read_text())
    assert len(named) > 5 and set(named) <= KINDS.keys()
