"""How often somebody may ask: limits as `600/minute`, and the moving windows that they are counted in."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from itertools import repeat
from typing import Protocol

from limits import RateLimitItem, parse_many

from service.errors import RateLimited

MAX_AMOUNT = 1_000_000
"""Of one limit: a moving window remembers when each hit came, in 32 bytes."""
MAX_PERIOD_S = 366 * 24 * 60 * 60
REMEMBERED_KEYS = 1024
MAX_WINDOWS = 65_536
"""Of one process. They are many only where they are of addresses, of which anybody may have any number."""

RateLimits = tuple[RateLimitItem, ...]


def read_rate_limits(text: str) -> RateLimits:
    """The limits of `600/minute`, or of several with a semicolon between them. Raises ValueError.

    The tightest stands first: what another one refuses has then used up nothing that lasts.
    """
    try:
        limits = parse_many(text)
    except ValueError:
        raise ValueError("should be like 600/minute, or 10/second;600/minute") from None
    if not all(1 <= limit.amount <= MAX_AMOUNT and limit.get_expiry() <= MAX_PERIOD_S for limit in limits):
        raise ValueError(f"should be 1 to {MAX_AMOUNT} in at most a year")
    return tuple(sorted(limits, key=lambda limit: (limit.get_expiry(), limit.amount)))


class Windows(Protocol):
    """Where hits are counted. The storages of `limits.aio` that have moving windows are such."""

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Note `amount` hits, all or none: whether the last `expiry` seconds then hold at most `limit`."""

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest hit of the last `expiry` seconds came (seconds since 1970), and how many they hold."""


class MemoryWindows:
    """The windows of this process. Of more than `max_windows` the one that was least recently used is forgotten.

    `limits` has a storage in memory too. It never forgets a key and walks over all of them up to a hundred times a
    second, each time in a new thread: whoever has many addresses could stop the service with it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        self._windows: OrderedDict[str, deque[float]] = OrderedDict()

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """As `Windows` says."""
        now = self._clock()
        hits = self._hits(key, now - expiry)
        if len(hits) + amount > limit:
            return False
        hits.extend(repeat(now, amount))
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """As `Windows` says."""
        now = self._clock()
        hits = self._hits(key, now - expiry)
        return time.time() - (now - hits[0] if hits else 0.0), len(hits)

    def _hits(self, key: str, since: float) -> deque[float]:
        hits = self._windows.get(key)
        if hits is None:
            hits = self._windows[key] = deque()
            if len(self._windows) > self._max_windows:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        while hits and hits[0] <= since:
            hits.popleft()
        return hits


@lru_cache(REMEMBERED_KEYS)
def _window(limit: RateLimitItem, who: str) -> tuple[str, int]:
    """The key of the hits that `limit` counts of `who`, and its seconds."""
    return limit.key_for(who), limit.get_expiry()


class Limiter:
    """Counts hits, and refuses those beyond a limit. What is refused does not count."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    async def hit(self, who: str, limits: RateLimits, count: int = 1) -> None:
        """Count `count` hits of `who`, all or none. Raises RateLimited."""
        for limit in limits:
            key, period_s = _window(limit, who)
            if not await self._windows.acquire_entry(key, limit.amount, period_s, count):
                oldest, _ = await self._windows.get_moving_window(key, limit.amount, period_s)
                wait_s = max(0.0, oldest + period_s - time.time())
                raise RateLimited(f"the rate limit is {limit}", limit=limit.amount, retry_after_s=wait_s)
