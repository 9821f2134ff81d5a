"""Attention of one prompt of 8,192 tokens, on tensors."""

import torch

from vllm_flashprefill import FlashPrefillConfig
from vllm_flashprefill.api import flash_prefill

device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(1, 8192, 8, 64, dtype=torch.bfloat16, device=device)
k, v = torch.randn(2, 1, 8192, 2, 64, dtype=torch.bfloat16, device=device)
out = flash_prefill(q, k, v, config=FlashPrefillConfig(alpha=0.5))
print(out.shape, out.dtype)
