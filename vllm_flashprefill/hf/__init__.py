"""Hugging Face transformers: sparse prefill as the attention implementation "flashprefill".

    from vllm_flashprefill import hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashprefill")

A prefill is sparse where it is plain causal attention over an unpadded batch; everything else goes through
transformers' "sdpa" and is counted with its reason (`stats`). torch.compile takes a decode's sdpa into its graph, where
nothing counts it, and breaks the graph at a prefill. Options, presets and their order are those of
`vllm_flashprefill.config`, without the engine's.
"""

from vllm_flashprefill.hf.attention import flash_prefill_attention, stats
from vllm_flashprefill.hf.flash_name import CONFIG_NAME, NAME
from vllm_flashprefill.hf.mask import CausalMask, flash_prefill_mask
from vllm_flashprefill.hf.registration import register, unregister

__all__ = ["CONFIG_NAME", "NAME", "CausalMask", "flash_prefill_attention", "flash_prefill_mask"]
__all__ += ["register", "stats", "unregister"]
