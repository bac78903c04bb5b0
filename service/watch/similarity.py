"""Who asks the same image again and again, a little changed each time, is likely attacking the model.

An attack that only sees answers (Square, HopSkipJump) needs thousands of near-duplicates of one image. One is no alert:
people send an image twice. Images are compared beside the requests that brought them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from service.metrics import Metrics
from service.watch.families import Families
from service.watch.fingerprints import Fingerprint, Fingerprints
from service.watch.inbox import Inbox
from service.work import Floats, Pixels

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Images whose fingerprints are taken in one go: 10 ms of a slow core."""


@dataclass(frozen=True, slots=True)
class Query:
    """An image that was asked about."""

    who: str
    """Key or address: images of different ones are never compared."""
    key: str
    """The name of the key, for metrics."""
    image: Pixels | Floats


class SimilarityWatch:
    """Counts near-duplicates of the images of each client; more than `limit` of one image are alerts."""

    def __init__(self, limit: int, families: Families, metrics: Metrics, threads: Executor) -> None:
        self._limit = limit
        self._families = families
        self._metrics = metrics
        self._threads = threads
        self._inbox = Inbox[Query]()
        self._fingerprints: Fingerprints | None = None

    def note(self, query: Query) -> None:
        """Look at it soon; what there is no room for is counted as skipped."""
        if not self._inbox.put(query, query.image.nbytes):
            self._metrics.similarity_skipped.inc()

    async def run(self) -> None:
        """For ever."""
        while True:
            queries = await self._inbox.take()
            for start in range(0, len(queries), AT_ONCE):
                try:
                    await self._compare(queries[start : start + AT_ONCE])
                except Exception:  # the next ones are looked at all the same
                    logger.exception("near-duplicates could not be counted")

    async def _compare(self, queries: Sequence[Query]) -> None:
        taker = await self._taker()
        loop = asyncio.get_running_loop()
        taken = await loop.run_in_executor(self._threads, _take, taker, queries)
        for query, likenesses in zip(queries, await self._families.note(taken), strict=True):
            self._count(query, likenesses)

    async def _taker(self) -> Fingerprints:
        salt = await self._families.salt()
        if self._fingerprints is None or self._fingerprints.salt != salt:
            self._fingerprints = Fingerprints(salt)
        return self._fingerprints

    def _count(self, query: Query, likenesses: int) -> None:
        if likenesses:
            self._metrics.near_duplicates.labels(query.key).inc()
        if likenesses > self._limit:
            self._metrics.similarity_alerts.inc()
        if likenesses == self._limit + 1:
            logger.warning("very many near-duplicates of one image", extra={"fields": {"from": query.who}})


def _take(fingerprints: Fingerprints, queries: Sequence[Query]) -> list[Fingerprint]:
    return [fingerprints.take(query.who, query.image) for query in queries]
