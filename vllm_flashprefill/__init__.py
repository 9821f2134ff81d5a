"""FlashPrefill: sparse prefill attention for vLLM.

Importing this package is cheap: neither torch nor vllm is loaded until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_flashprefill.config import PRESETS, FlashPrefillConfig

if TYPE_CHECKING:
    from vllm_flashprefill.counters import Stats

__version__ = "0.1.0"
__all__ = ["PRESETS", "FlashPrefillConfig", "__version__", "register", "revert", "stats"]


def register(**options: Any) -> None:
    """Make every vLLM engine that this process starts from now on use FlashPrefill.

    Picks the patch loader of the installed vLLM. Calling it again with the same options does nothing.

    Args:
        options: fields of `FlashPrefillConfig`; environment variables and ``--additional-config`` win over them.

    Raises:
        ValueError: an unknown option or variable, a wrong type or a value out of range.
        RuntimeError: an unsupported vLLM, or a different registration before.
    """
    from vllm_flashprefill.patches import registration

    registration.register(options)


def revert() -> None:
    """Undo `register`, for engines started from now on."""
    from vllm_flashprefill.patches import registration

    registration.revert()


def stats() -> Stats:
    """What this process's engines have done since it configured the first: density, and dense tokens by reason.

    Nothing of engines that other processes start, children of this one among them: each of those reads its own.
    Subtract an earlier reading to see one stretch of work.
    """
    from vllm_flashprefill.counters import read_stats

    return read_stats()
