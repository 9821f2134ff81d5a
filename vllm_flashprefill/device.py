"""From the host to a device."""

from __future__ import annotations

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, without waiting for it."""
    if device.type == "cuda":
        # From pageable memory the driver may wait for the stream.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
