"""Images and their near-duplicates, in tables that forget what was not seen lately."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.watch.fingerprints import Fingerprint

CAPACITY = 100_000
"""Hashes of all clients before those that were not seen since the last time are forgotten: of 2,000 images or more."""
SALT_BITS = 64


class Families(Protocol):
    """Where fingerprints meet those of before."""

    async def salt(self) -> int:
        """What fingerprints must be taken with now."""

    async def note(self, fingerprints: Sequence[Fingerprint]) -> list[int]:
        """Of each, taken in this order: how many near-duplicates of its first it makes; 0 if it is none.

        The same image as the one before, sample for sample, is none: its answer teaches nothing new.
        """


@dataclass(slots=True, eq=False)
class Family:
    """An image and its near-duplicates: how many came after the first, and the last one's exact hash."""

    likenesses: int
    last: int


class MemoryFamilies:
    """In this process. At most about twice `capacity` hashes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._salt = secrets.randbits(SALT_BITS)
        self._seen: dict[int, Family] = {}
        self._seen_before: dict[int, Family] = {}

    async def salt(self) -> int:
        """As `Families` says."""
        return self._salt

    async def note(self, fingerprints: Sequence[Fingerprint]) -> list[int]:
        """As `Families` says."""
        return [self._note(fingerprint) for fingerprint in fingerprints]

    @property
    def size(self) -> int:
        """Hashes that are known."""
        return len(self._seen) + len(self._seen_before)

    def _note(self, fingerprint: Fingerprint) -> int:
        family = self._closest(fingerprint)
        known = family is not None and family.last != fingerprint.exact
        if family is None:
            family = Family(0, fingerprint.exact)
        elif known:
            family.likenesses += 1
            family.last = fingerprint.exact
        if len(self._seen) >= self._capacity:
            self._seen, self._seen_before = {}, self._seen
        self._seen.update(dict.fromkeys(fingerprint.names, family))
        return family.likenesses if known else 0

    def _closest(self, fingerprint: Fingerprint) -> Family | None:
        known = [self._seen.get(name) or self._seen_before.get(name) for name in fingerprint.names]
        shared = Counter(family for family in known if family is not None).most_common(1)
        return shared[0][0] if shared and shared[0][1] >= fingerprint.shared else None
