"""What gateways share in one Redis beside the queue: the hits of rate limits, and answers that may come again.

No request depends on it. What Redis has not answered after `PATIENCE_S` this gateway answers by itself: a hit is
counted here, an answer is not found. After a failure nobody asks Redis until it has taken a write from `_look`, for
which nobody waits. So a Redis that is slow or gone costs requests one wait, not one each, and is used again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from limits.aio.storage import RedisStorage
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from service.cache import MAX_CACHE_BYTES
from service.metrics import Metrics
from service.rates import MemoryWindows, Windows
from service.remote.store import CACHE, PROBE, RATE, UNREACHABLE
from service.remote.wire import Malformed, pack_answer, unpack_answer
from service.watch.families import Families
from service.work import Answer

logger = logging.getLogger(__name__)

PATIENCE_S = 0.1
"""For a request to wait for Redis, connecting included."""
CONNECT_S = 1.0
"""The same where no request waits."""
LOOK_S = 1.0
"""Between two looks whether Redis is there."""
MAX_CONNECTIONS = 8
"""Of a gateway; whoever finds none free waits, within `PATIENCE_S`."""
MAX_ENTRY_BYTES = 4 * 2**20
"""Of an answer; a larger one is neither kept nor read."""
ENTRY_BYTES = 384
"""What Redis needs for an answer beside its bytes, and a quarter of them for rounding up; a test measures it."""

T = TypeVar("T")


class Unshared(Exception):
    """Redis has no answer: go on without it."""


class Shared:
    """One Redis, as requests see it: an answer at once, or none.

    `tells` says whether it is this that sets `clarifier_redis_up`; the queue does, where it is in Redis too.
    """

    def __init__(self, url: str, metrics: Metrics, *, tells: bool) -> None:
        self.pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            socket_timeout=CONNECT_S,
            socket_connect_timeout=CONNECT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self.redis = Redis(connection_pool=self.pool)
        self._metrics = metrics
        self._tells = tells
        self._is_up = False
        self._problem: str | None = "not asked yet"
        """As it was last logged."""
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look after Redis, on the running event loop."""
        self._looking = asyncio.create_task(self._look(), name="redis-look")

    async def stop(self) -> None:
        """Give the connections back; whatever Redis does, within a moment."""
        self._is_up = False
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking], timeout=CONNECT_S)
        with contextlib.suppress(*UNREACHABLE):
            async with asyncio.timeout(CONNECT_S):
                await self.pool.disconnect()

    @property
    def windows(self) -> SharedWindows:
        """Where rate limits count."""
        return SharedWindows(self)

    def cache(self, ttl_s: float) -> SharedCache:
        """Where answers are kept for `ttl_s` seconds."""
        return SharedCache(self, ttl_s)

    @property
    def families(self) -> Families:
        """Where near-duplicates meet."""
        from service.remote.families import SharedFamilies

        return SharedFamilies(self)

    async def ask(self, op: str, command: Callable[[], Awaitable[T]], *, beside: bool = False) -> T:
        """What `command` gets from Redis in time; raises Unshared, and counts an error under `op`.

        `beside` is what no request waits for: it may take longer, and decides nothing for those that do.
        """
        if not self._is_up:
            raise Unshared
        try:
            async with asyncio.timeout(CONNECT_S if beside else PATIENCE_S):
                return await command()
        except UNREACHABLE as error:
            self._metrics.redis_errors.labels(op).inc()
            if not beside and not isinstance(
                error, ResponseError
            ):  # a refusal costs no wait, and may be of one key: `_look` decides
                self._is_up = False
            raise Unshared from None

    def count_malformed(self) -> None:
        """Something in Redis was none of ours, and is left out."""
        self._metrics.redis_errors.labels("malformed").inc()

    async def _look(self) -> None:
        """For ever: whether Redis is there, as fast as requests need it, and takes what is written."""
        while True:
            try:
                async with asyncio.timeout(CONNECT_S):
                    await self.redis.ping()
                async with asyncio.timeout(PATIENCE_S):
                    await self.redis.set(PROBE, 1, px=int(1000 * LOOK_S))
            except Exception as error:  # whatever it is, the next look must come
                self._metrics.redis_errors.labels("look").inc()
                self._note(type(error).__name__)
            else:
                self._note(None)
            await asyncio.sleep(LOOK_S)

    def _note(self, problem: str | None) -> None:
        self._is_up = problem is None
        if self._tells:
            self._metrics.redis_up.set(self._is_up)
        if problem is None and self._problem is not None:
            logger.info("rate limits and cached answers are shared in Redis")
        elif problem is not None and problem != self._problem:
            logger.error("Redis (%s): rate limits and cached answers are this process's own", problem)
        self._problem = problem


class SharedWindows:
    """Hits of all gateways, in Redis by the clocks of the gateways; hits of this one in `alone` while it is away."""

    def __init__(self, shared: Shared, alone: Windows | None = None) -> None:
        self._shared = shared
        self._alone = MemoryWindows() if alone is None else alone
        options: dict[str, Any] = {"connection_pool": shared.pool}
        self._storage = RedisStorage("redis://", implementation="redispy", key_prefix=RATE, **options)

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """As `Windows` says."""
        with contextlib.suppress(Unshared):
            return await self._shared.ask("limit", lambda: self._storage.acquire_entry(key, limit, expiry, amount))
        return await self._alone.acquire_entry(key, limit, expiry, amount)

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """As `Windows` says."""
        with contextlib.suppress(Unshared):
            return await self._shared.ask("limit", lambda: self._storage.get_moving_window(key, limit, expiry))
        return await self._alone.get_moving_window(key, limit, expiry)


class SharedCache:
    """Answers of all gateways, each for `ttl_s` seconds. Those of this one take at most `limit` bytes at a time.

    Without Redis nothing is found and nothing kept. What is read is checked as what comes from a client: other programs
    may write to that Redis.
    """

    def __init__(
        self, shared: Shared, ttl_s: float, limit: int = MAX_CACHE_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._ttl_s = ttl_s
        self._limit = limit
        self._clock = clock
        self._kept = deque[tuple[float, int]]()
        """Of each answer that may still be there, when it ends and what it takes."""
        self.held = 0
        """Bytes of all of them."""

    async def find(self, keys: Sequence[bytes]) -> list[Answer | None]:
        """The answer of each key; None where there is none, or none that can be read."""
        try:
            found = await self._shared.ask("find", lambda: self._fetch(keys))
        except Unshared:
            return [None] * len(keys)
        return [self._read(key, packed) for key, packed in zip(keys, found, strict=True)]

    async def keep(self, answers: Mapping[bytes, Answer]) -> None:
        """Remember `answers`, as far as there is room until others are too old."""
        packed = {key.hex(): pack_answer(key.hex(), answer) for key, answer in answers.items()}
        kept = {name: data for name, data in packed.items() if self._has_room(len(data))}
        if kept:
            with contextlib.suppress(Unshared):
                await self._shared.ask("keep", lambda: self._write(kept))

    async def _fetch(self, keys: Sequence[bytes]) -> list[bytes | ResponseError]:
        pipeline = self._shared.redis.pipeline(transaction=False)
        for key in keys:
            pipeline.getrange(CACHE + key.hex(), 0, MAX_ENTRY_BYTES)  # not more, whatever somebody has put there
        found: list[bytes | ResponseError] = await pipeline.execute(raise_on_error=False)
        for each in found:
            if isinstance(each, ResponseError) and not str(each).startswith("WRONGTYPE"):
                raise each
        return found

    async def _write(self, packed: Mapping[str, bytes]) -> None:
        pipeline = self._shared.redis.pipeline(transaction=False)
        for name, data in packed.items():
            pipeline.set(CACHE + name, data, px=max(1, int(1000 * self._ttl_s)))
        await pipeline.execute()

    def _read(self, key: bytes, packed: bytes | ResponseError) -> Answer | None:
        if packed == b"":
            return None
        try:
            if isinstance(packed, ResponseError) or len(packed) > MAX_ENTRY_BYTES:
                raise Malformed("it is no answer")
            return unpack_answer(key.hex(), packed)
        except Malformed:
            self._shared.count_malformed()
            return None

    def _has_room(self, data_bytes: int) -> bool:
        now, size = self._clock(), ENTRY_BYTES + data_bytes + data_bytes // 4
        while self._kept and self._kept[0][0] <= now:
            self.held -= self._kept.popleft()[1]
        if data_bytes > MAX_ENTRY_BYTES or self.held + size > self._limit:
            return False
        self._kept.append((now + self._ttl_s, size))
        self.held += size
        return True
