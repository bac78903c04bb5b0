"""What requests leave for a loop beside them: bounded, and never waited for."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

MAX_BYTES = 32 * 2**20
"""Of images that wait for one loop."""

T = TypeVar("T")


class Inbox(Generic[T]):
    """Of one loop; the event loop's thread alone uses it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._inside = list[T]()
        self._filled = asyncio.Event()

    def put(self, one: T, size: int) -> bool:
        """Leave `one`, of `size` bytes; False if there is no room."""
        if self._held + size > self._max_bytes:
            return False
        self._held += size
        self._inside.append(one)
        self._filled.set()
        return True

    async def take(self, gather_s: float = 0.0) -> list[T]:
        """All that is inside, in order; waits for the first, and `gather_s` seconds for company."""
        await self._filled.wait()
        await asyncio.sleep(gather_s)
        self._filled.clear()
        taken, self._inside, self._held = self._inside, [], 0
        return taken
