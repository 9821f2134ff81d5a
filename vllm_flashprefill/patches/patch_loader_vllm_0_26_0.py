"""Registers FlashPrefill with vLLM 0.26.0 to 0.33.0 when imported.

Target: the class paths of CPU_ATTN, FLASH_ATTN and CUSTOM in ``vllm.v1.attention.backends.registry``.
Why: the platform answers with these names, so every layer for which vLLM would choose its CPU or FlashAttention
backend gets ours, which subclasses it; layers for which it chooses another backend are untouched.
How: ``register_backend(..., class_path=)``. CUSTOM makes ``--attention-backend CUSTOM`` work too.
Can go: with support for 0.26.0 to 0.33.0.
"""

from vllm_flashprefill.patches.registration import revert
from vllm_flashprefill.patches.registry import loader

__all__ = ["load", "revert"]

load = loader(__name__, "vllm.v1.attention")
load()
