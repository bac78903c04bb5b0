"""How long the engine will be busy with what is there already, by how long the last batches took."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from service.work import Key

MAX_KEYS = 256
"""That are remembered: clients can make more of chains and votes."""
LAST_BATCHES = 5
"""That tell. Their median does: a machine that stood still for a while is not slow for all that come after."""


class Pace:
    """Seconds that an image takes, by its key; a key that has not run yet counts as none."""

    def __init__(self) -> None:
        self._seconds: dict[Key, float] = {}
        self._last: dict[Key, deque[float]] = {}

    def note(self, key: Key, images: int, seconds: float) -> None:
        """A batch of `images` took `seconds`."""
        last = self._last.pop(key, None) or deque(maxlen=LAST_BATCHES)
        last.append(seconds / images)
        self._last[key] = last  # at the end: what ran last is forgotten last
        self._seconds[key] = median(last)
        if len(self._last) > MAX_KEYS:
            oldest = next(iter(self._last))
            del self._last[oldest], self._seconds[oldest]

    def expected_s(self, counts: Iterable[tuple[Key, int]]) -> float:
        """For so many images of each key."""
        return sum(self._seconds.get(key, 0.0) * count for key, count in counts)
