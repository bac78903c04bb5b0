"""An image as a few hashes that its near-duplicates share.

The probabilistic fingerprints of Blacklight (Li et al., "Blacklight: Scalable Defense for Neural Networks against
Query-Based Black-Box Attacks", USENIX Security 2022): samples are quantized, every run of 20 of them is hashed with a
secret salt, and an image is the smallest 50 of its hashes. Of large images only some rows and columns are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

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
ODD = np.uint64(0x9E3779B97F4A7C15)
"""Any odd number would do: its product with a hash moves the bits of it."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Of an image that somebody has sent: nobody else's has a hash of it."""

    names: tuple[int, ...]
    """The smallest hashes of the image's runs, each once."""
    exact: int
    """Of all its samples."""

    @property
    def shared(self) -> int:
        """So many names in common make another one a near-duplicate."""
        return min(SHARED, len(self.names))


class Fingerprints:
    """Takes fingerprints with one secret `salt` of 64 bits: only those can be compared."""

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self._base = salt | 1
        self._powers: dict[int, tuple[NDArray[np.uint64], NDArray[np.uint64]]] = {}

    def take(self, who: str, image: Pixels | Floats) -> Fingerprint:
        """Of an image (H, W, 3) that `who` has sent."""
        seen = image[:: -(-image.shape[0] // MAX_SIDE), :: -(-image.shape[1] // MAX_SIDE)]
        levels = seen if seen.dtype == np.uint8 else np.round(seen * 255)
        samples = (levels // QUANTIZATION).ravel().astype(np.uint64)
        powers, inverses = self._powers_of(samples.size)
        sums = np.cumsum((samples + np.uint64(1)) * powers)
        runs = (sums[WINDOW:] - sums[:-WINDOW]) * inverses * ODD
        runs ^= runs >> np.uint64(29)
        if runs.size > 4 * HASHES:  # many may be the same
            runs = np.partition(runs, 4 * HASHES)[: 4 * HASHES]
        distinct = np.unique(runs)[:HASHES] ^ np.uint64(self._hash(who.encode()))
        return Fingerprint(tuple(distinct.tolist()), self._hash(image.tobytes()))

    def _hash(self, data: bytes) -> int:
        digest = blake2b(data, digest_size=8, key=self.salt.to_bytes(8, "big")).digest()
        return int.from_bytes(digest, "big")

    def _powers_of(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """base^i, and base^-i for each run, modulo 2^64: a run has the same hash wherever it begins."""
        if size not in self._powers:
            inverse = pow(self._base, -1, 2**64)
            self._powers[size] = (_powers(self._base, size), _powers(inverse, size - WINDOW))
        return self._powers[size]


def _powers(base: int, size: int) -> NDArray[np.uint64]:
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(size - 1, base, np.uint64)]))
