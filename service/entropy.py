"""Random numbers of the operating system, fetched many at a time: a system call for every request would be felt."""

from __future__ import annotations

import os
import threading

FETCHED_BYTES = 4096
FRACTION_BITS = 53
"""Of a drawn fraction: as many as a double has."""


class Entropy:
    """Hands out what `os.urandom` gave, every byte once. Any thread may ask, and a forked process fetches its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = memoryview(b"")
        self._process = os.getpid()

    def take(self, count: int) -> bytes:
        """`count` bytes, at most FETCHED_BYTES."""
        with self._lock:
            if len(self._left) < count or self._process != os.getpid():
                self._left, self._process = memoryview(os.urandom(FETCHED_BYTES)), os.getpid()
            taken, self._left = self._left[:count], self._left[count:]
            return bytes(taken)

    def bits(self, count: int) -> int:
        """A number of at most `count` bits, each of them as likely."""
        size = (count + 7) // 8
        return int.from_bytes(self.take(size), "little") >> (8 * size - count)

    def happens(self, rate: float) -> bool:
        """True for the share `rate` of all calls, drawn anew for each."""
        return self.bits(FRACTION_BITS) < rate * (1 << FRACTION_BITS)
