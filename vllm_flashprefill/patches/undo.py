"""What a registration changes outside the package, and how each change is undone."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_flashprefill.patches.versions import installed_vllm

_undo: list[Callable[[], None]] = []


def on_revert(undo: Callable[[], None]) -> None:
    """Have `run` call this, last registered first."""
    _undo.append(undo)


def run() -> None:
    """Undo everything."""
    while _undo:
        _undo.pop()()


def wrap(owner: type | ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute of a class or module by what `make` makes of it, until `run`.

    Raises:
        RuntimeError: it neither defines nor inherits it.
    """
    if not hasattr(owner, name):
        raise RuntimeError(f"vLLM {installed_vllm()} has no {owner.__name__}.{name} for FlashPrefill to extend")
    own = vars(owner).get(name)
    setattr(owner, name, make(getattr(owner, name)))
    on_revert(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))


def set_variable(name: str, value: str) -> None:
    """Set an environment variable, which child processes inherit, until `run`."""
    previous = os.environ.get(name)
    os.environ[name] = value
    on_revert(lambda: os.environ.pop(name, None) if previous is None else os.environ.update({name: previous}))
