"""Who asks the same image again and again, a little changed each time, is likely attacking the model.

An attack that only sees answers (Square, HopSkipJump) needs thousands of near-duplicates of one image. They are told by
the probabilistic fingerprints of Blacklight (Li et al., "Blacklight: Scalable Defense for Neural Networks against
Query-Based Black-Box Attacks", USENIX Security 2022): samples are quantized, every run of 20 of them is hashed with a
secret salt, and an image is the smallest 50 of its hashes. Two images that share 25 are near-duplicates.

Ours differ in three things. Memory is one table for everybody, of hashes to the image that had them last, and what was
not seen lately is forgotten. Of large images only some rows and columns are looked at. And one near-duplicate is no
alert: people send an image twice.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.work import Floats, Pixels

WINDOW = 20
"""Samples in a run."""
QUANTIZATION = 50
"""Levels of 8 bits that count as one."""
HASHES = 50
"""Of an image."""
SHARED = 25
"""That make two images near-duplicates."""
MAX_SIDE = 64
"""Rows and columns that are looked at, about."""
CAPACITY = 100_000
"""Hashes of all clients before those that were not seen since the last time are forgotten: of 2,000 images or more."""
ODD = np.uint64(0x9E3779B97F4A7C15)
"""Any odd number would do: its product with a hash moves the bits of it."""


@dataclass(slots=True, eq=False)
class Family:
    """An image and its near-duplicates: how many came after the first, and the last one's exact hash."""

    likenesses: int
    last: int


class SimilarityWatch:
    """Counts near-duplicates of the images of each client; more than `limit` of one image are alerts."""

    def __init__(self, limit: int, capacity: int = CAPACITY) -> None:
        self._limit = limit
        self._capacity = capacity
        self._base = secrets.randbits(64) | 1
        self._powers: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint64]]] = {}
        self._seen: dict[int, Family] = {}
        self._seen_before: dict[int, Family] = {}

    def note(self, who: str, image: Pixels | Floats) -> int:
        """How many near-duplicates more than may be `who` has sent, with this image (H, W, 3); 0 if it is none of them.

        The same image as the one before, sample for sample, is not counted: its answer teaches nothing new.
        """
        names = self._fingerprint(who, image)
        exact = hash(image.tobytes())
        family = self._closest(names)
        if family is None:
            family = Family(0, exact)
        elif family.last != exact:
            family.likenesses += 1
            family.last = exact
        if len(self._seen) >= self._capacity:
            self._seen, self._seen_before = {}, self._seen
        self._seen.update(dict.fromkeys(names, family))
        return max(0, family.likenesses - self._limit)

    def _closest(self, names: list[int]) -> Family | None:
        known = [self._seen.get(name) or self._seen_before.get(name) for name in names]
        shared = Counter(family for family in known if family is not None).most_common(1)
        return shared[0][0] if shared and shared[0][1] >= min(SHARED, len(names)) else None

    def _fingerprint(self, who: str, image: Pixels | Floats) -> list[int]:
        """The smallest hashes of the image's runs, each once, as nobody else has them."""
        seen = image[:: -(-image.shape[0] // MAX_SIDE), :: -(-image.shape[1] // MAX_SIDE)]
        levels = seen if seen.dtype == np.uint8 else np.round(seen * 255)
        samples = (levels // QUANTIZATION).ravel().astype(np.uint64)
        powers, inverses = self._powers_of(samples.size)
        sums = np.cumsum((samples + np.uint64(1)) * powers)
        runs = (sums[WINDOW:] - sums[:-WINDOW]) * inverses * ODD
        runs ^= runs >> np.uint64(29)
        if runs.size > 4 * HASHES:  # many may be the same
            runs = np.partition(runs, 4 * HASHES)[: 4 * HASHES]
        distinct = np.unique(runs)[:HASHES] ^ np.uint64(hash(who) % 2**64)
        names: list[int] = distinct.tolist()
        return names

    def _powers_of(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """base^i, and base^-i for each run, modulo 2^64: a run has the same hash wherever it begins."""
        if size not in self._powers:
            inverse = pow(self._base, -1, 2**64)
            self._powers[size] = (_powers(self._base, size), _powers(inverse, size - WINDOW))
        return self._powers[size]


def _powers(base: int, size: int) -> NDArray[np.uint64]:
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(size - 1, base, np.uint64)]))
