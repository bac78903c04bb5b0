"""What stands between the routes and an engine: places are kept, images go in, outcomes come back.

`batching.Batcher` does it in this process, `remote.queue.RemoteQueue` through Redis.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from service.errors import ClarifierError, ClientLeft, DeadlineExceeded, Overloaded
from service.pace import Pace
from service.queue import Item, Outcome
from service.tracing import asking
from service.work import Key, Pixels

IN_TIME = 0.8
"""Of the time that is left to a request, what those before it may be expected to take."""


class Places:
    """How many places in a queue are kept for the images of one request, which are still being decoded.

    At the end of its `with` block, none any more.
    """

    __slots__ = ("_queue", "count")

    def __init__(self, queue: Dispatcher) -> None:
        self.count = 0
        self._queue = queue

    def free(self) -> None:
        """Those that were reserved and not used are anybody's."""
        self._queue.free(self)

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Dispatcher(ABC):
    """One queue. `reserve` keeps a place, `admit` takes it, `wait` waits for the answer."""

    def __init__(self, max_queue_size: int, max_queue_wait_ms: float) -> None:
        """A wait of 0 ms stands for any."""
        self.max_queue_size = max_queue_size
        self._max_queue_wait_s = max_queue_wait_ms / 1000 or math.inf
        self._reserved = 0

    # --- a request's way

    def check_open(self, count: int = 1) -> None:
        """Raise Draining, NotReady or Overloaded if `count` new items would be refused now."""
        self._check_running()
        taken = self.depth + self._reserved
        if taken + count > self.max_queue_size:
            raise Overloaded(f"{taken} of {self.max_queue_size} places are taken", limit=self.max_queue_size)

    @abstractmethod
    def check_in_time(self, key: Key, deadline: float) -> None:
        """Raise Overloaded if an image of `key` that came now would wait too long, as far as is known.

        Beyond its deadline, since who would wait in vain is better told at once; or longer than anybody should, since
        a long queue answers nobody sooner than a short one and outlasts the crowd that made it. Who would be in the
        next batch never waits too long by the latter.
        """

    def places(self) -> Places:
        """For a request, no place yet; `reserve` adds some, and `admit` uses them."""
        return Places(self)

    def free(self, places: Places) -> None:
        """Keep `places` no more."""
        self._reserved -= places.count
        places.count = 0

    def reserve(self, places: Places, count: int) -> None:
        """Add `count` places, all or none. Raises as `check_open`."""
        self.check_open(count)
        places.count += count
        self._reserved += count

    @abstractmethod
    def admit(
        self, places: Places, key: Key, images: Sequence[Pixels], seeds: Sequence[int], deadline: float
    ) -> list[Item]:
        """Queue `images` on places that were kept for them; places to spare are free again.

        Raises Draining, NotReady and DeadlineExceeded.
        """

    async def wait(self, items: Sequence[Item]) -> list[Outcome]:
        """What becomes of each of `items`, which were admitted together and are at least one.

        At their deadline DeadlineExceeded, wherever they are then. A caller that is cancelled takes them out.
        """
        left_s = max(0.0, items[0].deadline - time.monotonic())
        expiry = asyncio.get_running_loop().call_later(left_s, self._give_up, items, self._too_late)
        try:
            return [await item.future for item in items]
        except asyncio.CancelledError:
            self.withdraw(items)
            raise
        finally:
            expiry.cancel()

    def withdraw(self, items: Sequence[Item]) -> None:
        """Forget `items`: their client has left, and whoever waits for them is told so."""
        self._give_up(items, lambda item: ClientLeft(self._where(item)))

    def _too_late(self, item: Item) -> ClarifierError:
        error = DeadlineExceeded()
        error.was_running = self._where(item) == "running"
        return error

    def _give_up(self, items: Sequence[Item], error: Callable[[Item], ClarifierError]) -> None:
        unanswered = [item for item in items if item.future.cancelled() or not item.future.done()]
        deliver([(item, error(item)) for item in unanswered])
        self._forget(unanswered)

    def _refuse_if_late(
        self,
        pace: Pace,
        waiting: Counter[Key],
        key: Key,
        left_s: float,
        *,
        running_s: float = 0,
        running: int = 0,
        engines: int = 1,
    ) -> None:
        """Raise Overloaded as `check_in_time`, where `engines` share what takes `running_s` and all that is `waiting`,
        of which so many images may be `running` already.
        """
        is_next = waiting.total() - running < pace.room(key)
        everybody = {**waiting, key: waiting[key] + 1}
        expected_s = (running_s + pace.expected_s(everybody.items())) / engines
        until_start_s = 0.0 if is_next else expected_s - pace.last_batch_s(key, everybody[key]) / engines
        late_s = max(expected_s - IN_TIME * left_s, until_start_s - self._max_queue_wait_s)
        if late_s > 0:
            raise Overloaded(f"what waits already takes {expected_s:.1f} s", retry_after_s=late_s)

    # --- the end

    @abstractmethod
    def drain(self) -> None:
        """From now on items leave at once, without waiting for company."""

    @abstractmethod
    def finish(self) -> None:
        """Nobody else will come."""

    @abstractmethod
    async def stop(self, timeout_s: float) -> None:
        """Finish, give the engine `timeout_s` seconds for it, and answer 503 to whoever is left."""

    # --- facts, for probes and metrics

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many wait."""

    @property
    @abstractmethod
    def own_depth(self) -> int:
        """How many of them came by way of this process: over all of them a sum."""

    @property
    @abstractmethod
    def oldest_s(self) -> float:
        """How long the first of these has waited, in seconds; 0 if nobody does."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether what answers still runs; once it has ended, only another process can help."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a batch is known to run."""

    @property
    @abstractmethod
    def silence_s(self) -> float:
        """Seconds since the engine's last sign of life, infinite once it has ended; 0 if it is none of this process."""

    @property
    @abstractmethod
    def problem(self) -> str | None:
        """Why nobody can be answered now, silence apart; None if there is no such reason."""

    # --- what differs

    @abstractmethod
    def _check_running(self) -> None:
        """Raise Draining or NotReady if nobody is let in now."""

    @abstractmethod
    def _where(self, item: Item) -> str:
        """Where an unanswered `item` is, as `ClientLeft` says it."""

    @abstractmethod
    def _forget(self, items: Iterable[Item]) -> None:
        """Take `items`, which have their outcome, out of the queue."""


def new_items(key: Key, images: Sequence[Pixels], seeds: Sequence[int], deadline: float) -> list[Item]:
    """One item for each image, waiting since now. Raises DeadlineExceeded."""
    now = time.monotonic()
    if now >= deadline:
        raise DeadlineExceeded
    loop, trace = asyncio.get_running_loop(), asking.get()
    return [
        Item(key, image, seed, deadline, now, loop.create_future(), trace)
        for image, seed in zip(images, seeds, strict=True)
    ]


def deliver(outcomes: Iterable[tuple[Item, Outcome]]) -> None:
    """Answer those who are still there; on the event loop."""
    for item, outcome in outcomes:
        if not item.future.done():
            item.future.set_result(outcome)
