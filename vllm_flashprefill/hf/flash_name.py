"""The name that configs and models get in place of "flashprefill", which is an alias of it.

Code that asks for "flash" in an implementation's name takes ours for FlashAttention. The kinds there are:

- transformers 4: text encoders of SigLIP and SigLIP 2 hand on the mask of tokens, [batch, T], which sdpa cannot apply.
- transformers 5, `utils.generic.is_flash_attention_requested`: the name is fetched as a kernel from the hub; vision
  towers pass packed sequences; chunked attention and static caches get no mask; SAM 3 falls back; HRM refuses it.
- models' own code on the hub may do any of these.

Targets: the property `PretrainedConfig._attn_implementation`, by which all of them look a name up, and, on transformers
5, that function, which is also asked before a name is kept. How: the property gives the other name; every module that
holds the function is given one that says no to ours, and modules imported later find it in place. It can go when
transformers, and models' own code, ask for FlashAttention's own names.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

NAME = "flashprefill"
CONFIG_NAME = "sparse_prefill"

_originals: tuple[property, Callable[..., bool] | None] | None = None


def install() -> None:
    """Raises RuntimeError where the property or the function is not where it is looked for."""
    global _originals
    from packaging.version import Version
    from transformers import PretrainedConfig, __version__
    from transformers.utils import generic

    kept, asked = vars(PretrainedConfig).get("_attn_implementation"), vars(generic).get("is_flash_attention_requested")
    if not isinstance(kept, property) or (asked is None and Version(__version__).major >= 5):
        missing = "utils.generic.is_flash_attention_requested" if kept else "PretrainedConfig._attn_implementation"
        raise RuntimeError(f"transformers {__version__} has no {missing} for flashprefill to extend")

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != NAME and asked(config, requested_attention_implementation, *args, **kwargs)

    PretrainedConfig._attn_implementation = property(
        lambda config: CONFIG_NAME if kept.fget(config) == NAME else kept.fget(config), kept.fset
    )
    if asked is not None:
        _rebind(asked, functools.wraps(asked)(is_flash_attention_requested))
    _originals = kept, asked


def remove() -> None:
    global _originals
    from transformers import PretrainedConfig
    from transformers.utils import generic

    PretrainedConfig._attn_implementation, asked = _originals
    if asked is not None:
        _rebind(generic.is_flash_attention_requested, asked)
    _originals = None


def _rebind(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` in place of `old` in all modules that hold it under its name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(old.__name__) is old:
            setattr(module, old.__name__, new)
