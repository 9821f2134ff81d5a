"""What differs between devices."""

from __future__ import annotations

import torch


def is_slow_in_bfloat16(device: torch.device | str) -> bool:
    """Whether it is a CPU of which PyTorch uses AVX2 at most: it multiplies bfloat16 many times slower than float32."""
    return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "NO AVX",
        "DEFAULT",
    )


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, without waiting for it."""
    if device.type == "cuda":
        # From pageable memory the driver may wait for the stream.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
