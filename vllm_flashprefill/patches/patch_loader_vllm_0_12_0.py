"""Registers FlashPrefill with vLLM 0.11.1 to 0.13.0 when imported.

Target: the class paths of CPU_ATTN, FLASH_ATTN and CUSTOM in ``vllm.attention.backends.registry``.
Why: the platform answers with these names, so every layer for which vLLM would choose its CPU or FlashAttention
backend gets ours, which subclasses it; layers for which it chooses another backend are untouched.
How: ``register_backend(..., class_path=)``. CUSTOM makes ``VLLM_ATTENTION_BACKEND=CUSTOM`` work too; it is the
same member as TORCH_SDPA, a name that vision layers compare with but never resolve.
Can go: with support for 0.11.1 to 0.13.0.
"""

from vllm_flashprefill.patches.registration import revert
from vllm_flashprefill.patches.registry import loader

__all__ = ["load", "revert"]

load = loader(__name__, "vllm.attention")
load()
