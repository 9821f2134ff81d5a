"""Check the commands that the pages tell to run: `python -m tools.commands [PAGE ...]`.

Takes the code of README.md, CONTRIBUTING.md, docs/ and the folders' READMEs: fenced blocks, and what stands in
backticks and begins as a command. Files, make targets and modules must exist, `--help` must know each option,
FlashPrefill its own options and variables, and what Python code imports from it must be there. Python code that needs
neither vLLM nor a model's weights is run. Exits with 1 after a line for each fault. tools/run_commands.py runs the
commands themselves.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# What in backticks is a command.
STARTS = ("python ", "python -m ", "make ", "pip ", "vllm serve ", "curl ", "scripts/", "FLASHPREFILL")
# Programs that are not of this project; of their arguments only FlashPrefill's are checked.
OTHERS = {"vllm", "curl", "build", "apt"}
VARIABLE = re.compile(r"^([A-Z][A-Z0-9_]*)=(.*)$")
# Code that imports one of these needs a model or an engine, so it is not run.
NOT_RUN = {"vllm", "transformers"}


class Code(NamedTuple):
    """One command line, or a block of Python, and where it stands."""

    page: str
    language: str
    text: str


def pages() -> list[Path]:
    folders = [ROOT, *(path.parent for path in sorted(ROOT.glob("*/README.md")))]
    first = [folder / "README.md" for folder in folders]
    return [*first, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def codes(page: Path, backticks: bool = True) -> Iterator[Code]:
    """A page's commands, one a line, and its Python code; lines that end with a backslash are one command.

    Args:
        backticks: also what stands in single backticks and begins as a command.
    """
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    for indent, language, block in FENCE.findall(text):
        if language == "python":
            yield Code(name, "python", "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True)))
        elif language in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.strip().startswith("#"):
                    yield Code(name, "sh", line.strip())
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)) if backticks else ():
        span = " ".join(span.split())
        if span.startswith(STARTS) and " " in span:
            yield Code(name, "sh", span)


def faults(code: Code) -> list[str]:
    """What is wrong with it, a line each."""
    try:
        return list(python_faults(code.text) if code.language == "python" else command_faults(code.text))
    except (SyntaxError, ValueError) as error:
        return [str(error)]


def command_faults(line: str) -> Iterator[str]:
    words = shlex.split(line, comments=True)
    if "|" in words:
        words = words[: words.index("|")]
    while words and (found := VARIABLE.match(words[0])):
        yield from variable_faults(*found.groups())
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    yield from flashprefill_faults(arguments)
    if program == "make":
        targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        yield from (f"make has no {target}" for target in arguments if target not in targets)
    elif program in ("pip", "python", "python3") or program.endswith("/bin/python"):
        yield from of_python(program, arguments)
    elif "/" in program:
        if not (ROOT / program).is_file():
            yield f"there is no {program}"
    elif program not in OTHERS:
        yield f"{program} is not known here"


def of_python(program: str, arguments: list[str]) -> Iterator[str]:
    if program == "pip" or arguments[:2] == ["-m", "pip"]:
        files = [file for flag, file in itertools.pairwise(arguments) if flag == "-r"]
        yield from (f"there is no {file}" for file in files if not (ROOT / file).exists())
        return
    if not arguments:
        return
    if arguments[0] == "-m":
        package, _, module = arguments[1].partition(".")
        if (ROOT / package).is_dir():
            # A page writes NAME for any of a folder's.
            yield from () if module.isupper() else option_faults(arguments[1], arguments[2:])
        elif package not in OTHERS and importlib.util.find_spec(package) is None:
            yield f"there is no module {package}"
    elif not (ROOT / arguments[0]).is_file():
        yield f"there is no {arguments[0]}"
    elif "argparse" in (ROOT / arguments[0]).read_text():
        yield from option_faults(arguments[0], arguments[1:])


def option_faults(program: str, arguments: list[str]) -> Iterator[str]:
    # What comes after -- is no option.
    arguments = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    for option in sorted(options - set(re.findall(r"--[\w-]+", help_of(program)))):
        yield f"{program} has no {option}"


@functools.cache
def help_of(program: str) -> str:
    """What a module's or a script's `--help` prints, in this process, so that torch is imported once.

    Raises:
        ValueError: there is no such module, or it prints no help.
    """
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [program, "--help"]
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            # The module itself, or its package, may have been imported before.
            warnings.simplefilter("ignore", RuntimeWarning)
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
    except SystemExit as ended:
        if not ended.code:
            return said.getvalue()
        raise ValueError(f"{program} --help ends with {ended.code}") from None
    except ImportError as error:
        raise ValueError(f"{program}: {error}") from error
    finally:
        sys.argv = arguments
    raise ValueError(f"{program} takes no --help")


def variable_faults(name: str, value: str) -> Iterator[str]:
    from vllm_flashprefill import config

    if not name.startswith(config.ENV_ENABLE):
        return
    try:
        if name == config.ENV_ENABLE:
            config.enabled({name: value})
        elif name == config.ENV_LOG_STATS:
            config.log_interval({name: value})
        else:
            config.FlashPrefillConfig.from_env({name: value})
    except ValueError as error:
        yield str(error)


def flashprefill_faults(arguments: list[str]) -> Iterator[str]:
    from vllm_flashprefill.config import ADDITIONAL_CONFIG_KEY, FlashPrefillConfig

    for flag, value in itertools.pairwise(arguments):
        if flag == "--additional-config" and value.startswith("{"):
            try:
                FlashPrefillConfig.from_options(json.loads(value)[ADDITIONAL_CONFIG_KEY])
            except (ValueError, KeyError) as error:
                yield f"--additional-config: {error}"


def python_faults(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    imported: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [(node.module, alias.name) for alias in node.names]
    ours = [(module, name) for module, name in imported if module.startswith("vllm_flashprefill")]
    missing = [f"{module} has no {name}" for module, name in ours if not is_there(module, name)]
    yield from missing
    loads = any(module == "vllm_flashprefill.patches" for module, _ in ours)
    if (
        imported
        and not missing
        and not loads
        and NOT_RUN.isdisjoint(module.partition(".")[0] for module, _ in imported)
    ):
        exec(compile(tree, "<page>", "exec"), {})


def is_there(module: str, name: str | None) -> bool:
    """Whether a module has a name; a submodule is only looked for, since the import of a loader registers it."""
    try:
        if name is None or importlib.util.find_spec(f"{module}.{name}") is not None:
            return importlib.util.find_spec(module) is not None
    except ImportError:
        # The module is no package.
        pass
    return hasattr(importlib.import_module(module), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    found = [code for page in options.pages or pages() for code in codes(page.resolve())]
    wrong = 0
    for code in found:
        for fault in faults(code):
            wrong += 1
            print(f"{code.page}: {code.text.splitlines()[0]}\n    {fault}")
    print(f"{len(found)} commands, {wrong} faults")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
