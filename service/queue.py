"""Who goes next: images that wait, in groups that can run together. Plain data and a clock reading, no threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import ClarifierError
from service.work import Answer, Key, Pixels


@dataclass(frozen=True, slots=True)
class Completed:
    """An answer, and what it cost: the wait, the run of its batch, and how many shared it."""

    answer: Answer
    queue_ms: float
    inference_ms: float
    batch_size: int
    stage_ms: Mapping[str, float]
    """The run, by the engine's own stages."""


Outcome = Completed | ClarifierError
"""What becomes of an image."""


@dataclass(slots=True, eq=False)
class Item:
    """One image that waits. Times are readings of the monotonic clock, in seconds."""

    key: Key
    image: Pixels
    seed: int
    deadline: float
    enqueued_at: float
    future: asyncio.Future[Outcome] = field(repr=False)
    traceparent: str = ""
    """Of the request that asks; empty where nobody traces."""


class BatchQueue:
    """Items in the order they came, in groups that can run together. Not thread-safe.

    A batch is limited by its work: an image that is drawn many times takes the room of as many images.
    """

    def __init__(self, max_batch_size: int, max_delay_s: float) -> None:
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._groups: dict[Key, deque[Item]] = {}
        self.depth = 0

    def add(self, items: Sequence[Item]) -> None:
        """Append `items`."""
        for item in items:
            self._groups.setdefault(item.key, deque()).append(item)
        self.depth += len(items)

    def discard(self, item: Item) -> None:
        """Take `item` out; nothing happens if it is not in the queue any more."""
        group = self._groups.get(item.key)
        if group and item in group:
            group.remove(item)
            self._forget_if_empty(item.key)
            self.depth -= 1

    def take(self, now: float, *, at_once: bool = False) -> list[Item]:
        """The batch that should run now; empty if waiting is better.

        The oldest item's group goes when it is full or the oldest has waited long enough (or `at_once`);
        until then another group that is full may go ahead.
        """
        oldest = self._oldest()
        if oldest is None:
            return []
        due = at_once or now >= oldest.enqueued_at + self._max_delay_s
        key = oldest.key if due else self._first_full()
        return [] if key is None else self._take_from(key)

    def wait_s(self, now: float) -> float | None:
        """Seconds until the oldest item's delay ends; None when nobody waits."""
        oldest = self._oldest()
        return None if oldest is None else max(0.0, oldest.enqueued_at + self._max_delay_s - now)

    @property
    def oldest_since(self) -> float | None:
        """When the first of those who wait came; None when nobody waits."""
        oldest = self._oldest()
        return None if oldest is None else oldest.enqueued_at

    def is_full(self, key: Key) -> bool:
        """Whether a whole batch of `key` waits."""
        return len(self._groups.get(key, ())) >= self.room(key)

    def counts(self) -> list[tuple[Key, int]]:
        """How many images of each key wait."""
        return [(key, len(group)) for key, group in self._groups.items()]

    def clear(self) -> list[Item]:
        """Everybody who waits; the queue is empty afterwards."""
        items = [item for group in self._groups.values() for item in group]
        self._groups.clear()
        self.depth = 0
        return items

    def _oldest(self) -> Item | None:
        heads = (group[0] for group in self._groups.values())
        return min(heads, key=lambda item: item.enqueued_at, default=None)

    def _first_full(self) -> Key | None:
        full = (key for key in self._groups if self.is_full(key))
        return min(full, key=lambda key: self._groups[key][0].enqueued_at, default=None)

    def _take_from(self, key: Key) -> list[Item]:
        group = self._groups[key]
        batch = [group.popleft() for _ in range(min(len(group), self.room(key)))]
        self._forget_if_empty(key)
        self.depth -= len(batch)
        return batch

    def room(self, key: Key) -> int:
        """How many images of `key` run together."""
        return max(1, self._max_batch_size // key.votes)

    def _forget_if_empty(self, key: Key) -> None:
        if not self._groups[key]:
            del self._groups[key]
