"""Have transformers 5 not take "flashprefill" for one of FlashAttention's kernels.

Target: `transformers.utils.generic.is_flash_attention_requested`, under which every name that contains "flash"
is fetched as a kernel from the hub, and gets packed sequences and no masks. How: every module that holds the
function is given one that says no to this name; modules imported later find it in place. It can go when
transformers asks for FlashAttention's own names. Transformers 4 has no such function and needs none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def replace_check(our_name: str) -> None:
    """Raises RuntimeError where the function is not where it is looked for."""
    import transformers
    from packaging.version import Version
    from transformers.utils import generic

    original = getattr(generic, "is_flash_attention_requested", None)
    if original is None:
        if Version(transformers.__version__).major >= 5:
            raise RuntimeError(
                f"transformers {transformers.__version__} has no utils.generic.is_flash_attention_requested "
                "for flashprefill to extend"
            )
        return

    @functools.wraps(original)
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != our_name and original(config, requested_attention_implementation, *args, **kwargs)

    _rebind(original, is_flash_attention_requested)


def restore_check() -> None:
    from transformers.utils import generic

    replaced = getattr(generic, "is_flash_attention_requested", None)
    if replaced is not None:
        _rebind(replaced, replaced.__wrapped__)


def _rebind(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` in place of `old` in all modules that hold it under its name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(old.__name__) is old:
            setattr(module, old.__name__, new)
