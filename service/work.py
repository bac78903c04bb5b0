"""What passes between a gateway and an engine: what is asked, and what is answered. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from service.errors import ClarifierError

Pixels = NDArray[np.uint8]
"""Of one image: (H, W, 3), RGB."""
Floats = NDArray[np.float32]
"""Of one image: (H, W, 3) in [0, 1]; or of its classes: probabilities (K,)."""


class Operation(StrEnum):
    """What is done with an image."""

    CLASSIFY = "classify"
    PURIFY = "purify"
    DETECT = "detect"


@dataclass(frozen=True, slots=True)
class Key:
    """What images must agree on to run in one batch."""

    operation: Operation
    model: str
    """`name@version` of a loaded bundle."""
    defense: str = "none"
    """Canonical chain, as `Manifest.resolve` writes it."""
    votes: int = 1
    explain: bool = False
    purified: bool = False
    """Whether a classification hands back the image that it judged; only for one vote."""
    floats: bool = False
    """Whether the images are Floats in [0, 1], not Pixels."""
    digest: str = field(default="", kw_only=True)
    """Of that bundle, since a reload may put another one in its place; empty: of whichever is there."""


@dataclass(frozen=True, slots=True)
class Classified:
    """Probabilities (K,); the next two only where they were asked for (and the bundle has an AID)."""

    probabilities: Floats
    undefended: Floats | None = None
    aid_score: float | None = None
    ran: str | None = None
    """The chain that `auto` ran; None where the defense itself ran."""
    purified: Floats | None = None
    """The image (H, W, 3) in [0, 1] that was judged, where it was asked for."""
    degraded: bool = False
    """Whether `auto` ran its cheap chain in place of the strong one, which was asked for too often."""
    linf: float | None = None
    """The L-infinity distance of the image that was judged to the model input; None where votes were averaged, or
    nothing purifies."""


@dataclass(frozen=True, slots=True)
class Purified:
    """The purified image (H, W, 3) in [0, 1], and its L-infinity distance to the model input."""

    image: Floats
    linf: float
    degraded: bool = False
    """As of Classified."""


@dataclass(frozen=True, slots=True)
class Detected:
    """The probability that the image is natural."""

    aid_score: float


Answer = Classified | Purified | Detected


def is_degraded(answer: Answer) -> bool:
    """Whether a later one to the same question could be a stronger defense's."""
    return not isinstance(answer, Detected) and answer.degraded


@dataclass(frozen=True, slots=True)
class Ran:
    """What an engine made of a batch: an outcome per image, in order, and the milliseconds of each of its stages."""

    outcomes: Sequence[Answer | ClarifierError]
    stage_ms: Mapping[str, float] = field(default_factory=dict)


class EngineFault(Exception):
    """A batch failed in a way the engine has a name for: `kind` is oom, cuda or other."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind
