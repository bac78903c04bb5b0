"""What routes ask about jobs. A Redis that cannot be reached is NotReady here, and what is forged is no job."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.errors import KeyReused, NotReady, Overloaded, UnknownJob
from service.jobs.records import Found, Spec
from service.jobs.runner import Runner
from service.jobs.store import Answered, JobStore
from service.metrics import Metrics
from service.remote.store import UNREACHABLE
from service.remote.wire import Malformed
from service.settings import Settings

logger = logging.getLogger(__name__)


class Board:
    """The jobs of a gateway's Redis. Every method raises NotReady, and those of one job UnknownJob."""

    def __init__(self, settings: Settings, store: JobStore, runner: Runner, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._runner = runner
        self._metrics = metrics

    def start(self) -> None:
        """Work on jobs from now on, on the running event loop."""
        self._runner.start()

    async def stop(self) -> None:
        """Leave all jobs to other gateways."""
        await self._runner.stop()
        await self._store.close()

    async def check_room(self) -> None:
        """Raises Overloaded if no job more may be made now."""
        with self._asked():
            count = await self._store.count()
        self._check(count < self._settings.max_jobs, count)

    async def put(self, job: str, start: int, chunk: bytes, failed: Sequence[Answered], kept_s: float) -> None:
        """Keep a chunk of a job that is not made yet."""
        with self._asked():
            await self._store.put(job, start, chunk, failed, kept_s)

    async def make(self, spec: Spec, failed: int, idempotency: str | None, sent: str) -> str:
        """Make the job whose chunks are kept; its id, or that of the one that was made of the same before.

        Raises Overloaded and KeyReused.
        """
        settings = self._settings
        limits = {"ttl_s": settings.job_ttl_s, "most": settings.max_jobs}
        with self._asked():
            made = await self._store.create(spec, failed, idempotency=idempotency, sent=sent, **limits)  # type: ignore[arg-type]
        self._check(made.outcome != "full", made.count)
        if made.outcome == "lost":
            raise NotReady("Redis has lost a part of the upload")
        if made.outcome == "known" and made.hash != sent:
            raise KeyReused
        self._runner.wake()
        return made.id

    async def find(self, job: str, owner: str) -> Found:
        """The job of this id, if `owner` made it."""
        try:
            with self._asked():
                found = await self._store.find(job)
        except Malformed:
            self.note_malformed()
            found = None
        if found is None or found.spec.owner != owner:
            raise UnknownJob
        return found

    async def results(self, job: str, numbers: Sequence[int]) -> list[bytes | None]:
        """The packed answers of these images."""
        with self._asked():
            return await self._store.results(job, numbers)

    async def forget(self, job: str) -> None:
        """Everything about a job; who works on it stops."""
        with self._asked():
            await self._store.forget(job)
        self._runner.cancel(job)

    def note_malformed(self) -> None:
        """Something in Redis was not written by us."""
        logger.error("a job in Redis cannot be read: it is left out")
        self._metrics.redis_errors.labels("malformed").inc()

    def _check(self, has_room: bool, count: int) -> None:
        if not has_room:
            limit = self._settings.max_jobs
            raise Overloaded(f"{count} of {limit} jobs are not done", limit=limit, actual=count)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except UNREACHABLE:  # the queue, which needs the same Redis, says so in the log
            self._metrics.redis_errors.labels("jobs").inc()
            raise NotReady("Redis cannot be reached") from None
