"""How long the engine will be busy with what is there already, by how long the last batches took."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from statistics import median

from service.work import Key

MAX_KEYS = 256
"""That are remembered: clients can make more of chains and votes."""
LAST_BATCHES = 5
"""Of one size, that tell. Their median does: a machine that stood still for a while is not slow for all after it."""


class Pace:
    """Seconds that batches take, by key and size; a key that has not run yet counts as none.

    What is not known is taken to be fast, so that nobody is refused for it: a batch that is larger than all before it
    to take no longer than the largest, and one between two known sizes its share of the larger.
    """

    def __init__(self, room: Callable[[Key], int]) -> None:
        self.room = room
        """How many images of a key run together."""
        self._last: dict[Key, dict[int, deque[float]]] = {}
        self._known: dict[Key, list[tuple[int, float]]] = {}
        """Sizes and their medians, in order."""

    def note(self, key: Key, images: int, seconds: float) -> None:
        """A batch of `images` took `seconds`."""
        last = self._last.pop(key, None) or defaultdict(lambda: deque(maxlen=LAST_BATCHES))
        size = min(images, self.room(key))  # a worker may take more at once than its gateway knows
        last[size].append(seconds * size / images)
        self._last[key] = last  # at the end: what ran last is forgotten last
        self._known[key] = sorted({**dict(self._known.get(key, ())), size: median(last[size])}.items())
        if len(self._last) > MAX_KEYS:
            oldest = next(iter(self._last))
            del self._last[oldest], self._known[oldest]

    def expected_s(self, counts: Iterable[tuple[Key, int]]) -> float:
        """For so many images of each key, in batches that are as full as they can be."""
        expected_s = 0.0
        for key, count in counts:
            known = self._known.get(key)
            if known:
                room = self.room(key)
                full, rest = divmod(count, room)
                expected_s += full * _batch_s(known, room) + _batch_s(known, rest)
        return expected_s

    def last_batch_s(self, key: Key, count: int) -> float:
        """For the last batch of `count` images of a key, as `expected_s` counts it."""
        return self.expected_s([(key, (count - 1) % self.room(key) + 1)])


def _batch_s(known: list[tuple[int, float]], images: int) -> float:
    if not images:
        return 0.0
    place = bisect_left(known, (images, 0.0))
    smaller_s = known[place - 1][1] if place else 0.0
    if place == len(known):
        return smaller_s
    larger, larger_s = known[place]
    return max(smaller_s, larger_s * images / larger)
