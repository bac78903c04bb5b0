"""`auto`, ours: the AID score decides, image by image, between a cheap and a strong defense.

ZeroPur turns away from any confident answer, right or wrong, and costs clean images most of their accuracy. So it is
spent only on images that AID finds unnatural. An attacker who knows the gate looks natural to it, and meets the cheap
defense alone: what is behind it is not what `auto` is worth against such a one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.aid import Aid
from models.defense import Purifier
from models.randomness import derive_seed


class GatePurifier(nn.Module):
    """The strong chain for images whose AID score is below `threshold`, the cheap chain for the others."""

    def __init__(self, aid: Aid, threshold: float, *, cheap: Sequence[Purifier], strong: Sequence[Purifier]) -> None:
        super().__init__()
        self.aid, self.threshold = aid, threshold
        self.cheap, self.strong = (nn.ModuleList(chain) for chain in (cheap, strong))  # type: ignore[arg-type]

    @property
    def is_random(self) -> bool:
        return any(purifier.is_random for purifier in [*self.cheap, *self.strong])

    @torch.no_grad()
    def suspects(self, images: Tensor) -> Tensor:
        """Which images the strong chain is for, bool (N,)."""
        scores: Tensor = self.aid(images)
        return scores < self.threshold

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Purified images, same shape, in [0, 1]; differentiable where the chains are. The gate itself is a step."""
        return self.routed(images, seeds, self.suspects(images))

    def routed(self, images: Tensor, seeds: Sequence[int], suspects: Tensor) -> Tensor:
        """The same where these are the suspects, bool (N,)."""
        purified = images
        for chain, name, members in ((self.cheap, "cheap", ~suspects), (self.strong, "strong", suspects)):
            where = members.nonzero().flatten()
            if len(where) and len(chain):
                own = [seeds[index] for index in where.tolist()]
                purified = purified.index_copy(0, where, _through(chain, name, images[where], own))
        return purified


class DecidedGate(nn.Module):
    """A gate that need not look: it is known already which images are suspects, bool (N,)."""

    def __init__(self, gate: GatePurifier, suspects: Tensor) -> None:
        super().__init__()
        self.gate, self.suspects = gate, suspects

    @property
    def is_random(self) -> bool:
        return self.gate.is_random

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """What the gate's `forward` gives where it decides like this."""
        return self.gate.routed(images, seeds, self.suspects)


def _through(chain: nn.ModuleList, name: str, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """The chain applied left to right; every purifier has draws of its own."""
    for position, purifier in enumerate(chain):
        images = purifier(images, [derive_seed(seed, name, position) for seed in seeds])
    return images
