"""Make "flashprefill" known to transformers, and undo it."""

from __future__ import annotations

from typing import Any

from vllm_flashprefill.config import FlashPrefillConfig, env_options
from vllm_flashprefill.hf import attention, flash_name
from vllm_flashprefill.hf.flash_name import CONFIG_NAME, NAME
from vllm_flashprefill.hf.mask import flash_prefill_mask

OLDEST_TRANSFORMERS = "4.56"

# The options given in code; None where nothing is registered.
_options: dict[str, Any] | None = None


def register(**options: Any) -> None:
    """Make "flashprefill" known to transformers. Calling it again with the same options does nothing.

    Args:
        options: fields of `FlashPrefillConfig`; environment variables win over them.

    Raises:
        ValueError: an unknown option or variable, a wrong type or a value out of range, or one that is vLLM's alone.
        RuntimeError: transformers is missing or too old, or a registration with other options before.
    """
    global _options
    FlashPrefillConfig.from_options(options)
    environ = env_options()
    if FlashPrefillConfig.from_options(environ, options).compute_dtype != "auto":
        raise ValueError('flashprefill: compute_dtype is for KV caches in e4m3, as vLLM has them; leave it at "auto"')
    if _options is not None:
        if options != _options:
            raise RuntimeError(
                f"flashprefill is already registered with transformers, with the options {_options}; "
                "call vllm_flashprefill.hf.unregister() before registering others"
            )
        return
    _check_transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    flash_name.install()
    for name in (NAME, CONFIG_NAME):
        AttentionInterface.register(name, attention.flash_prefill_attention)
        AttentionMaskInterface.register(name, flash_prefill_mask)
    _options = options
    attention.use_options(environ, options)


def unregister() -> None:
    """Undo `register`; nothing if there is nothing to undo.

    A model that was loaded with "flashprefill" has to be given another implementation, by
    ``model.set_attn_implementation("sdpa")``, or a new registration before it runs again.
    """
    global _options
    if _options is None:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name in (NAME, CONFIG_NAME):
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    flash_name.remove()
    _options = None


def _check_transformers() -> None:
    from packaging.version import Version

    try:
        from transformers import __version__
    except ImportError as error:
        raise RuntimeError(
            f"flashprefill needs transformers {OLDEST_TRANSFORMERS} or newer, which cannot be imported: {error}"
        ) from error
    if Version(__version__) < Version(OLDEST_TRANSFORMERS):
        raise RuntimeError(f"flashprefill needs transformers {OLDEST_TRANSFORMERS} or newer, not {__version__}")
