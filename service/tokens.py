"""A bucket of tokens: so many a second on average, and a burst of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.settings import Settings


class TokenBucket:
    """`per_s` tokens come a second, as long as there are fewer than `burst`, with which it begins. For one thread."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()

    def take(self, count: int = 1) -> bool:
        """Take `count` if there is one at least, the rest of those that come next; whether they were taken."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + self._per_s * (now - self._filled_at))
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= count
        return True


def strong_tokens(settings: Settings) -> TokenBucket | None:
    """For the strong chains of `auto` in one engine; None where nothing caps them."""
    if not settings.auto_strong_per_s:
        return None
    return TokenBucket(settings.auto_strong_per_s, settings.max_batch_size)
