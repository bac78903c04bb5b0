"""A worker's side of Redis: what waits there is taken, run, and answered to the gateway that holds the request.

What a worker has it touches every second. What another one has not touched for `IDLE_MS` it claims, one entry at a time
and alone, so that an entry that kills its worker takes no neighbor along again; after `MAX_DELIVERIES` workers it is
parked and answered 500.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from models.manifest import UnknownDefense
from service.batching import Batcher
from service.errors import ClarifierError, ClientLeft, Draining, InferenceFailed, NotReady
from service.loading import Loaded
from service.metrics import Metrics
from service.queue import Item, Outcome
from service.remote.store import UNREACHABLE, Announcement, Store, Taken
from service.remote.wire import Malformed, Work, pack_reply, unpack_work
from service.repository import Catalog, DescribedBundle, name_of
from service.settings import Settings
from service.tracing import Tracing
from service.work import Key

logger = logging.getLogger(__name__)

BEAT_S = 1.0
TAKE_WAIT_MS = 500
"""For something to come, before the worker looks whether it shall end."""
IDLE_MS = 3000
"""An entry that was not touched for so long belongs to nobody."""
LEARN_S = 3.0
"""After a reload, for gateways to learn what is served now."""
MAX_DELIVERIES = 3
"""So many workers may die over an entry."""
RETRY_S = 0.2
UNANSWERED = (Draining, NotReady, ClientLeft)
"""Outcomes that are for another worker, or for nobody."""


class RemoteEngine:
    """One engine between Redis and its gateways."""

    def __init__(
        self, settings: Settings, loaded: Loaded, store: Store, metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self.name = secrets.token_hex(8)
        self.draining = False
        self._settings = settings
        self._loaded = loaded
        self._store = store
        self._metrics = metrics
        self._bundles = _by_digest(loaded.catalog)
        """What it takes images for: what it serves, and for a while what it has served."""
        self._batcher = Batcher(
            loaded.run_batch,
            engine_name=loaded.engine,
            max_batch_size=settings.max_batch_size,
            max_queue_delay_ms=0,  # company is waited for in Redis
            max_queue_size=sys.maxsize,
            max_queue_wait_ms=0,  # a gateway has refused whom it should
            metrics=metrics,
            tracing=tracing,
        )
        self._held: dict[str, Taken] = {}
        """What this worker has, by entry."""
        self._items: dict[str, Item] = {}
        """What of it waits for the engine or is in it."""
        self._answering = set[asyncio.Task[None]]()
        self._last_beat = -float("inf")
        self._next_claim = 0.0
        self._prepared = False
        self._turning = asyncio.Lock()
        """Held while it takes and runs."""
        self._troubles: dict[str, str] = {}
        """What Redis refused since the last beat, by operation: said once."""

    async def run(self) -> None:
        """Until `draining` is set, or the engine ends by itself."""
        self._batcher.start()
        self._metrics.watch_device(lambda: self._loaded.memory_bytes())
        self._metrics.note_bundles(self._loaded.catalog.digests, self._loaded.devices)
        beside = [asyncio.create_task(self._forever("beat", self._beat)), asyncio.create_task(self._listen())]
        try:
            while not self.draining and self._batcher.alive:
                await self._try("take", self._undisturbed_turn)
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*self._answering), self._settings.drain_timeout_s)
            await self._batcher.stop(self._settings.drain_timeout_s)
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await self._try("end", lambda: self._store.forget_worker(self.name))
            await self._store.close()

    async def swap(self, loaded: Loaded) -> None:
        """Serve `loaded`; back when nobody can ask any more for what was served before.

        Until gateways know, and those that they have let in are answered, it takes images for both.
        """
        new = _by_digest(loaded.catalog)
        async with self._turning:  # the next turn prepares
            self._loaded, self._bundles, self._prepared = loaded, self._bundles | new, False
        self._metrics.note_bundles(loaded.catalog.digests, loaded.devices)
        await asyncio.sleep(LEARN_S + self._settings.request_timeout_ms / 1000)
        async with self._turning:
            self._bundles = new
        logger.info("has let go of what it served before")

    @property
    def died(self) -> bool:
        """Whether the engine ended though nobody asked it to."""
        return not self._batcher.alive and not self.draining

    def why_not_ready(self) -> str | None:
        """The reason why it takes nothing now; None if there is none."""
        if self.draining:
            return "draining"
        if time.monotonic() - self._last_beat > IDLE_MS / 1000:
            return "Redis cannot be reached"
        return self.why_not_live()

    def why_not_live(self) -> str | None:
        """The reason to start it anew; None if there is none."""
        silent = self._batcher.silence_s > 3 * self._settings.request_timeout_ms / 1000
        return "the engine is silent" if silent else None

    # --- taking and answering

    async def _undisturbed_turn(self) -> None:
        async with self._turning:
            await self._turn()

    async def _turn(self) -> None:
        """Take what waits, or one entry whose worker has died, and run it."""
        if not self._prepared:
            await self._prepare()
        taken = await self._claimed() or await self._taken()
        if taken:
            await self._run(taken)

    async def _claimed(self) -> list[Taken]:
        if time.monotonic() < self._next_claim:
            return []
        claimed = await self._store.claim(self._bundles, self.name, IDLE_MS)
        if claimed is None:
            self._next_claim = time.monotonic() + BEAT_S
            return []
        if claimed.deliveries > MAX_DELIVERIES:
            await self._park(claimed)
            return []
        logger.warning("an entry of a worker that is gone is run again (%d)", claimed.deliveries)
        return [claimed]

    async def _taken(self) -> list[Taken]:
        """At most a batch, and what comes until the first of it has waited long enough."""
        size, delay_ms = self._settings.max_batch_size, self._settings.max_queue_delay_ms
        taken = await self._store.take(self._bundles, self.name, size, TAKE_WAIT_MS)
        self._hold(taken)
        ends = time.monotonic() + delay_ms / 1000
        while taken and len(taken) < size and (left_ms := int(1000 * (ends - time.monotonic()))) > 0:
            try:
                more = await self._store.take(self._bundles, self.name, size - len(taken), left_ms)
            except UNREACHABLE as error:  # what is here runs without them
                self._note_error("take", error)
                break
            self._hold(more)
            taken += more
        return taken

    def _hold(self, taken: Sequence[Taken]) -> None:
        self._held.update({each.entry: each for each in taken})

    async def _run(self, taken: Sequence[Taken]) -> None:
        """Through the engine, in groups that can run together; back when the last of it is done."""
        self._hold(taken)
        groups = dict[Key, list[tuple[Taken, Work]]]()
        strange = list[Taken]()
        for each in taken:
            work = self._read(each)
            if work is None:
                strange.append(each)
            else:
                groups.setdefault(work.key, []).append((each, work))
        runs = [self._run_group(group) for group in groups.values()]
        for failed in await asyncio.gather(*runs, *map(self._discard, strange), return_exceptions=True):
            if failed is not None:
                raise failed

    def _read(self, taken: Taken) -> Work | None:
        """The image, if a bundle of this worker can run it; None for an entry that no gateway has written."""
        try:
            work = unpack_work(taken.fields)
            bundle = self._bundles[taken.digest]
            height, width = bundle.manifest.input_size
            if work.key.model != name_of(bundle) or work.image.shape != (height, width, 3):
                raise Malformed("it is for another bundle")
            if bundle.manifest.resolve(work.key.defense) != work.key.defense:
                raise Malformed("its defense is not written as gateways do")
        except (KeyError, Malformed, UnknownDefense):
            logger.error("an entry in Redis cannot be read: it is left out")
            return None
        return replace(work, key=replace(work.key, digest=taken.digest))

    async def _run_group(self, group: Sequence[tuple[Taken, Work]]) -> None:
        entries = [taken.entry for taken, _ in group]
        try:
            items = self._admit([work for _, work in group])
            self._items.update(zip(entries, items, strict=True))
            outcomes = await self._batcher.wait(items)
        except BaseException:  # they are for another worker
            for entry in entries:
                self._held.pop(entry, None)
            raise
        finally:
            for entry in entries:
                self._items.pop(entry, None)
        task = asyncio.create_task(self._answer(list(zip(group, outcomes, strict=True))))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _admit(self, works: Sequence[Work]) -> list[Item]:
        deadline = time.monotonic() + max(work.left_ms for work in works) / 1000  # their gateways know each one's
        images, seeds = [work.image for work in works], [work.seed for work in works]
        with self._batcher.places() as places:
            self._batcher.reserve(places, len(works))
            items = self._batcher.admit(places, works[0].key, images, seeds, deadline)
        for item, work in zip(items, works, strict=True):
            item.traceparent = work.traceparent
        return items

    async def _answer(self, outcomes: Sequence[tuple[tuple[Taken, Work], Outcome]]) -> None:
        """Every outcome to its gateway; until Redis takes them, or nobody can wait for them any more."""
        answers = [
            (taken, work.gateway, pack_reply(work.uid, outcome))
            for (taken, work), outcome in outcomes
            if not isinstance(outcome, UNANSWERED)
        ]
        ends = time.monotonic() + max(work.left_ms for (_, work), _ in outcomes) / 1000
        while answers and time.monotonic() < ends:
            try:
                await self._store.finish(answers)
                break
            except UNREACHABLE as error:
                self._note_error("finish", error)
                await asyncio.sleep(RETRY_S)
        for (taken, _), _ in outcomes:
            self._held.pop(taken.entry, None)

    async def _park(self, taken: Taken) -> None:
        """It has killed every worker that had it: answer 500, and keep what it was for people to look at."""
        logger.error("an entry has ended %d workers: it is parked", taken.deliveries - 1)
        self._metrics.engine_errors.labels(self._loaded.engine, "killed").inc()
        try:
            work = unpack_work(taken.fields)
        except Malformed:
            await self._store.discard(taken)
            return
        key = work.key
        parked = {"uid": work.uid, "model": key.model, "operation": key.operation, "defense": key.defense}
        await self._store.park(parked)
        await self._store.finish([(taken, work.gateway, pack_reply(work.uid, InferenceFailed()))])

    async def _discard(self, taken: Taken) -> None:
        self._held.pop(taken.entry, None)
        self._metrics.redis_errors.labels("malformed").inc()
        await self._store.discard(taken)

    # --- beside it

    async def _prepare(self) -> None:
        await self._store.prepare(
            {
                digest: {"manifest": bundle.manifest.model_dump(mode="json"), "report": dict(bundle.report)}
                for digest, bundle in self._bundles.items()
            }
        )
        self._prepared = True
        logger.info("takes images for %s", ", ".join(map(name_of, self._bundles.values())))

    async def _beat(self) -> None:
        if self._prepared:
            loaded = self._loaded
            says = Announcement(bundles=loaded.catalog.digests, device=loaded.device, engine=loaded.engine)
            await self._store.touch(list(self._held.values()), self.name)  # first: a Redis without memory still does it
            if not await self._store.beat_worker(self.name, says, self._bundles):
                self._prepared = False
            self._last_beat = time.monotonic()
            self._metrics.redis_up.set(1)
            if self._troubles:
                logger.info("Redis takes what it is told")
            self._troubles.clear()
        await asyncio.sleep(BEAT_S)

    async def _listen(self) -> None:
        """Whoever has left need not be run."""

        async def listen() -> None:
            async for entry in self._store.gone():
                if (item := self._items.get(entry)) is not None:
                    self._batcher.withdraw([item])

        await self._forever("gone", listen)

    async def _forever(self, op: str, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._try(op, step)

    async def _try(self, op: str, step: Callable[[], Awaitable[None]]) -> None:
        """One step; one that fails is counted, and tried again after a while."""
        try:
            await step()
        except UNREACHABLE as error:
            self._note_error(op, error)
            await asyncio.sleep(RETRY_S)
        except ClarifierError as error:  # the batcher takes nothing: it ends
            logger.warning("%s", error.detail)
            await asyncio.sleep(RETRY_S)
        except Exception:
            logger.exception("the loop %s stumbled", op)
            await asyncio.sleep(RETRY_S)

    def _note_error(self, op: str, error: Exception) -> None:
        self._metrics.redis_errors.labels(op).inc()
        self._metrics.redis_up.set(0)
        self._prepared = self._prepared and not str(error).startswith("NOGROUP")
        kind = type(error).__name__
        if self._troubles.get(op) != kind:
            logger.error("Redis (%s): %s", op, kind)
        self._troubles[op] = kind


def _by_digest(catalog: Catalog) -> dict[str, DescribedBundle]:
    return {bundle.digest: bundle for bundle in catalog.bundles.values()}
