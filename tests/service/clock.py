"""A clock that goes when it is told to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """In seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now
