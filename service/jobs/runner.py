"""Which jobs a gateway works on: every one takes some, as long as it holds their leases.

One that dies lets them expire, and another goes on with the images that have no answer; so nothing is lost, and an
answer that comes twice counts once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress

from service.gateway import Gateway
from service.jobs.patience import Patience
from service.jobs.sender import Sender
from service.jobs.store import JobStore
from service.remote.queue import RemoteQueue
from service.remote.store import UNREACHABLE
from service.remote.wire import Malformed

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Between two looks for jobs that nobody works on."""
LEASE_MS = 5000
RENEW_S = 1.0
MAX_RUNNING = 4
"""Jobs that one gateway works on at once."""


class Runner:
    """The jobs that one gateway works on."""

    def __init__(self, gateway: Gateway, queue: RemoteQueue, store: JobStore) -> None:
        self.name = secrets.token_hex(8)
        self._gateway = gateway
        self._metrics = gateway.metrics
        self._store = store
        self._patience = Patience(gateway.metrics)
        self._sender = Sender(gateway, queue, store, self._patience)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def start(self) -> None:
        """On the running event loop."""
        self._looking = asyncio.create_task(self._look_forever(), name="jobs")

    def wake(self) -> None:
        """There is a new job."""
        self._news.set()

    def cancel(self, job: str) -> None:
        """Stop working on `job`; its images leave the queue."""
        if (task := self._running.get(job)) is not None:
            task.cancel()

    async def stop(self) -> None:
        """Leave every job to others."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._leave()

    async def _look_forever(self) -> None:
        while not self._gateway.draining:
            try:
                await self._look()
            except UNREACHABLE as error:
                self._patience.note(error)
            except Exception:
                logger.exception("the search for jobs stumbled")
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait()
        await self._leave()

    async def _look(self) -> None:
        unfinished, leased = await self._store.lease(self.name, LEASE_MS, MAX_RUNNING - len(self._running))
        self._patience.forget()
        self._metrics.jobs.set(unfinished)
        for job in leased:
            if job not in self._running:
                task = self._running[job] = asyncio.create_task(self._run(job), name=f"job-{job}")
                task.add_done_callback(lambda _, job=job: self._running.pop(job, None))  # type: ignore[misc]

    async def _leave(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: str) -> None:
        """Work on a leased job until it is done, gone or somebody else's. What is forged is forgotten."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._work_and_release(job))
        except* Malformed:
            logger.error("a job in Redis cannot be read: it is left out")
            self._metrics.redis_errors.labels("malformed").inc()
            with suppress(*UNREACHABLE):
                await self._store.forget(job)
        except* UNREACHABLE as errors:  # its lease expires
            self._patience.note(errors)
        except* Exception:
            logger.exception("a job stumbled: it is taken up again")

    async def _work_and_release(self, job: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        keeping = asyncio.create_task(self._keep_lease(job, task))
        try:
            found = await self._store.find(job)
            if found is not None:
                await self._sender.work(found)
        except asyncio.CancelledError:
            with suppress(*UNREACHABLE):
                await self._store.release(job, self.name)
            raise
        finally:
            keeping.cancel()
        await self._store.release(job, self.name)

    async def _keep_lease(self, job: str, work: asyncio.Task[None]) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                if not await self._store.renew(job, self.name, LEASE_MS):
                    work.cancel()
                    return
            except UNREACHABLE as error:
                self._patience.note(error)
