"""The supported vLLM versions, and which of them the installed one is."""

from __future__ import annotations

import functools
import logging

from packaging.version import Version

logger = logging.getLogger("vllm.flashprefill")

# vLLM's release to the module of its loader, which serves the releases up to the next one too.
LOADERS = {
    "0.10.0": "patch_loader_vllm_0_10_0",
    "0.12.0": "patch_loader_vllm_0_12_0",
    "0.24.0": "patch_loader_vllm_0_24_0",
}


def installed_vllm() -> str:
    """The release of the installed vLLM, without local or post-release parts.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    try:
        from vllm import __version__
    except ImportError as error:
        raise RuntimeError(f"flashprefill needs vLLM, which cannot be imported: {error}") from error
    return Version(__version__).base_version


def loader_for(version: str) -> str:
    """The module name of the loader for a vLLM release; the nearest older one, with a warning, if none is its own.

    Raises:
        RuntimeError: older than every loader.
    """
    if version in LOADERS:
        return LOADERS[version]
    tested = ", ".join(LOADERS)
    older = [known for known in LOADERS if Version(known) < Version(version)]
    if not older:
        raise RuntimeError(f"flashprefill supports vLLM {tested}, not {version}; install one of those")
    nearest = max(older, key=Version)
    _warn_untested(version, tested, LOADERS[nearest])
    return LOADERS[nearest]


@functools.cache
def _warn_untested(version: str, tested: str, loader: str) -> None:
    logger.warning("FlashPrefill is tested with vLLM %s, not %s; trying %s", tested, version, loader)
