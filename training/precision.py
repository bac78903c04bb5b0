"""The precision that training computes in."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast, or a switched-off one for float32, on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
