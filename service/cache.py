"""Answers that the engine gave before, for images that come again. Off unless CLARIFIER_CACHE_TTL_S is set.

What is kept is the engine's answer, so request id, timing and `top_k` are each request's own; and only an answer that
would be the same again: of a chain that draws nothing, or of a request with a seed. Errors and
degraded answers are not kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from service.work import Answer, Classified, Floats, Key, Pixels, Purified

MAX_CACHE_BYTES = 64 * 2**20
"""Of all answers that a process keeps."""
ENTRY_BYTES = 1024
"""An answer takes less than this beside its pixels and probabilities; a test measures it."""


class AnswerCache(Protocol):
    """Where answers are kept, by the keys that `answer_keys` makes. Out of order, it finds and keeps nothing."""

    async def find(self, keys: Sequence[bytes]) -> list[Answer | None]:
        """The answer of each key; None where there is none, or none any more."""

    async def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Remember `answers` for a while."""


def answer_keys(scope: str, digest: str, key: Key, seed: int | None, images: Sequence[Pixels]) -> list[bytes]:
    """What tells the answer to each of `images` from any other: the sha-256 of the question and the pixels.

    Nothing is found across two scopes. `digest` is that of the bundle, `seed` None if nothing is drawn.
    """
    question = [scope, digest, key.operation, key.defense, key.votes, key.explain, key.purified, key.floats, seed]
    begun = hashlib.sha256(json.dumps(question).encode())  # where it ends and pixels begin, JSON itself says

    def ended(image: Pixels) -> bytes:
        sha256 = begun.copy()
        sha256.update(np.ascontiguousarray(image).data)
        return sha256.digest()

    return [ended(image) for image in images]


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer, what it takes, and when it is too old: a reading of the monotonic clock."""

    answer: Answer
    size: int
    expires_at: float


class MemoryCache:
    """Answers of this process, each for `ttl_s` seconds; those used last, as many as fit into `limit` bytes."""

    def __init__(self, ttl_s: float, limit: int = MAX_CACHE_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._clock = clock
        self._entries = OrderedDict[bytes, Entry]()
        self.held = 0
        """Bytes of all entries."""

    async def find(self, keys: Sequence[bytes]) -> list[Answer | None]:
        """The answer of each key; None where there is none, or none any more."""
        return [self._find(key) for key in keys]

    async def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Remember `answers`, and forget others that were not asked for as long."""
        for key, answer in answers.items():
            self._keep(key, answer)

    def _find(self, key: bytes) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() >= entry.expires_at:
            self._forget(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def _keep(self, key: bytes, answer: Answer) -> None:
        size = ENTRY_BYTES + sum(part.nbytes for part in _arrays(answer))
        if size > self._limit:
            return
        if key in self._entries:
            self._forget(key)
        while self.held + size > self._limit:
            self._forget(next(iter(self._entries)))
        self._entries[key] = Entry(_alone(answer), size, self._clock() + self._ttl_s)
        self.held += size

    def _forget(self, key: bytes) -> None:
        self.held -= self._entries.pop(key).size


def _arrays(answer: Answer) -> list[Floats]:
    match answer:
        case Classified():
            parts = (answer.probabilities, answer.undefended, answer.purified)
            return [part for part in parts if part is not None]
        case Purified(image):
            return [image]
    return []


def _alone(answer: Answer) -> Answer:
    """A copy, read-only: the arrays of an answer are parts of its batch's, which would all be kept with it."""
    match answer:
        case Classified():
            return replace(
                answer,
                probabilities=_copy(answer.probabilities),
                undefended=None if answer.undefended is None else _copy(answer.undefended),
                purified=None if answer.purified is None else _copy(answer.purified),
            )
        case Purified(image):
            return replace(answer, image=_copy(image))
    return answer


def _copy(array: Floats) -> Floats:
    copy = array.copy()
    copy.flags.writeable = False
    return copy
