"""Long texts that every Python carries: the documentation inside the standard library, and its source code.

What `python -m evaluation` calibrates on, scripts/generate.py and the tests take theirs from `pydoc_data.topics`, and
the "code" of calibration is of zipfile, tarfile and subprocess; nothing here is. Its "docs" are docstrings too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from vllm_flashprefill.real_model import source_of

# Modules written in Python, by how much documentation they hold.
DOCUMENTED = (
    "difflib doctest inspect statistics logging ipaddress smtplib http.cookiejar configparser email.message json "
    "threading os http.server unittest.case optparse logging.handlers codecs urllib.parse socketserver pdb "
    "shutil traceback urllib.request argparse xmlrpc.server ssl typing unittest.mock _pyio random heapq functools "
    "collections contextlib fractions tempfile textwrap turtle mailbox imaplib ftplib pickletools sched "
    "string timeit trace calendar csv gettext getopt glob gzip hmac locale pathlib pprint queue selectors shelve "
    "signal socket tokenize types uuid warnings weakref zipapp"
).split()
SOURCES = "_pydecimal argparse mailbox pickletools imaplib optparse unittest.mock inspect ipaddress statistics".split()

SHORTEST_DOCSTRING = 200


def prose() -> str:
    """Docstrings of the standard library, one after the other."""
    found = []
    for module in DOCUMENTED:
        for node in ast.walk(ast.parse(source_of(module))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST_DOCSTRING:
                    found.append(text)
    return "\n\n".join(found)


def code() -> str:
    """Source code of the standard library, file after file."""
    return "\n\n".join(source_of(module) for module in SOURCES)


class Stream:
    """The tokens of a text, read from any place on; it starts again where it ends."""

    def __init__(self, encode: Callable[[str], list[int]], text: str) -> None:
        self.tokens = encode(text)

    def take(self, start: int, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            at = (start + len(taken)) % len(self.tokens)
            taken += self.tokens[at : at + count - len(taken)]
        return taken
