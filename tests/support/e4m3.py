"""Numbers in e4m3, and vLLM's classes on a CPU as on a GPU that takes caches of them."""

import torch

FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"


def to_e4m3(x, scale):
    """[..., heads, D] over a scale of one element or [heads], beyond the range its ends."""
    return (x.float() / scale.view(-1, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)


def take_e4m3_caches(monkeypatch):
    # Each version asks one of them.
    monkeypatch.setattr(f"{FLASH_ATTN}.flash_attn_supports_fp8", lambda: True, raising=False)
    monkeypatch.setattr(f"{FLASH_ATTN}.flash_attn_supports_kv_cache_dtype", lambda *_, **__: True, raising=False)
