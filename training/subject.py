"""What is attacked, and what an attack on it is: its level, its bound, its settings and what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.aid import AidPurifier
from models.defense import DefendedClassifier
from models.zeropur import ZeroPurPurifier
from training.attacks.threats import Threat


@dataclass(frozen=True)
class Work:
    """What an attack costs per image, for the estimate: passes through the bare classifier, or the whole defense."""

    bare: float = 0
    """Gradients of the classifier alone."""
    looks: float = 0
    """Gradients through the defense."""
    answers: float = 1
    """Answers of the defense, the verdict among them."""


Level = Literal["L1", "L2", "L3", "L4", "L5", "L6"]
GROUPS: Mapping[Level, str] = {
    "L1": "grey_box",
    "L2": "adaptive",
    "L3": "adaptive",
    "L4": "adaptive",
    "L5": "adaptive",
    "L6": "unseen",
}
"""Where the report puts a level's attacks."""


@dataclass(frozen=True)
class Subject:
    """A defense under attack: how the report calls it, and the classifier with the chain in front of it."""

    name: str
    defended: DefendedClassifier

    @property
    def purifiers(self) -> list[nn.Module]:
        """The chain, left to right."""
        return list(self.defended.chain)

    @property
    def descends(self) -> bool:
        """Whether an answer can take gradients, which makes it a hundred times as costly."""
        parts = [part for purifier in self.purifiers for part in purifier.modules()]
        aligned = any(isinstance(part, ZeroPurPurifier) and part.preset.coarse_steps for part in parts)
        return aligned or any(isinstance(part, AidPurifier) for part in parts)


@dataclass(frozen=True)
class Attack:
    """One attack as it is run on a batch."""

    name: str
    level: Level
    settings: Mapping[str, object]
    """All that decides its result, beside images, labels, seed, networks and, if it is not shared, the defense."""
    images: int
    """How many of the shuffled test images it attacks."""
    run: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    """Images (N, 3, H, W), labels (N,) and the images' numbers to adversarial images."""
    threat: Threat | None
    """What it must keep to; None for one that has no ball."""
    work: Work
    shared: bool = False
    """Whether it attacks what other defenses have too, so that each is given the same images: the bare classifier, or a
    purifier that its settings describe."""
    known_seeds: Callable[[Sequence[int]], list[int]] | None = None
    """The randomness of the verdict, where the attacker chose it; else nobody has seen it."""
