"""How long the engine will be busy with what is there already, by how long the last batches took."""

from __future__ import annotations

from collections.abc import Iterable

from service.work import Key

MAX_KEYS = 256
"""That are remembered: clients can make more of chains and votes."""
WEIGHT = 0.5
"""Of the last batch; those before it have the rest."""


class Pace:
    """Seconds that an image takes, by its key; a key that has not run yet counts as none."""

    def __init__(self) -> None:
        self._seconds: dict[Key, float] = {}

    def note(self, key: Key, images: int, seconds: float) -> None:
        """A batch of `images` took `seconds`."""
        each = seconds / images
        known = self._seconds.pop(key, each)  # to the end: what ran last is forgotten last
        self._seconds[key] = known + WEIGHT * (each - known)
        if len(self._seconds) > MAX_KEYS:
            del self._seconds[next(iter(self._seconds))]

    def expected_s(self, counts: Iterable[tuple[Key, int]]) -> float:
        """For so many images of each key."""
        return sum(self._seconds.get(key, 0.0) * count for key, count in counts)
