"""Randomness is an argument: every draw belongs to one image and comes from that image's own seed.

So an image and a seed give the same answer alone, in a batch of any size, whatever the neighbors, and on any
device (draws are made on the CPU and then moved).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

SEED_LIMIT = 2**64


def derive_seed(seed: int, *path: int | str) -> int:
    """A new seed in [0, 2**64) for one use of `seed`, named by `path`: different uses have unrelated draws.

    Raises ValueError for a seed outside [0, 2**64).
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"a seed is a whole number from 0 to 2**64 - 1, not {seed}")
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_for(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one use of `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def fresh_seeds(count: int) -> list[int]:
    """Seeds that nobody chose, one per image, drawn from torch's global generator."""
    return torch.randint(0, 2**63 - 1, (count,)).tolist()


def normal(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal draws (N, *shape), one row per seed."""
    rows = [torch.randn(*shape, generator=generator_for(seed, "noise")) for seed in seeds]
    return torch.stack(rows).to(device)


def uniform(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform draws in [0, 1), (N, *shape), one row per seed."""
    rows = [torch.rand(*shape, generator=generator_for(seed, "uniform")) for seed in seeds]
    return torch.stack(rows).to(device)


def permutations(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Random permutations of 0..count-1, int64 (N, count), one row per seed."""
    rows = [torch.randperm(count, generator=generator_for(seed, "cells")) for seed in seeds]
    return torch.stack(rows).to(device)
