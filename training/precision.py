"""The precision that training computes in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["bfloat16", "float32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bfloat16 autocast, or a switched-off one for float32, on `device`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is no slower than float32 on `device`; x86 CPUs without AVX-512 convert at every value."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT")
