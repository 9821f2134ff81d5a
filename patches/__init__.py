"""In a checkout, `from patches import patch_loader_vllm_0_12_0` is `vllm_flashprefill.patches`."""

import sys

import vllm_flashprefill.patches

sys.modules[__name__] = vllm_flashprefill.patches
