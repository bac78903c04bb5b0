"""A gateway's way to engines that are elsewhere: images go into Redis, outcomes come back, and no engine is here.

Three loops, none of which an error ends: `_hand_over` sends what was admitted or withdrawn, many requests at a time;
`_take_answers` answers; `_look` says that this gateway lives and learns who works. Images stay here until they are
answered, so that a Redis that has forgotten them is given them again. Every deadline is this gateway's own, by the
monotonic clock: an entry that is too late is taken out of Redis, and no clock is compared with another machine's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from service.dispatch import Dispatcher, Places, deliver, new_items
from service.errors import Draining, InferenceFailed, NotReady, Overloaded
from service.metrics import Metrics
from service.pace import Pace
from service.queue import Completed, Item, Outcome
from service.remote.roster import Roster
from service.remote.store import UNREACHABLE, Request, Store
from service.remote.wire import Malformed, Reply, fits, pack_work, unpack_reply
from service.repository import Catalog
from service.work import Key, Pixels

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""Between two looks at who works and how much waits."""
RETRY_S = 0.2
"""After an error, before Redis is tried again."""
ANSWERS_WAIT_MS = 500
START = "0-0"
"""Before the first entry of a stream."""


@dataclass(slots=True)
class Sent:
    """An image that is not answered yet."""

    uid: str
    item: Item
    digest: str
    entry: str | None = None
    """Its name in Redis, once it is there."""
    spare: int = 0
    """Places that must be free behind it for it to be queued."""


class RemoteQueue(Dispatcher):
    """The queue in Redis, as one gateway sees it. `learn` is told of the bundles whenever they change."""

    def __init__(
        self,
        store: Store,
        *,
        max_queue_size: int,
        max_queue_wait_ms: float,
        max_batch_size: int,
        metrics: Metrics,
        learn: Callable[[Catalog], None],
    ) -> None:
        """`max_batch_size` is what workers are expected to have too."""
        super().__init__(max_queue_size, max_queue_wait_ms)
        self.name = secrets.token_hex(8)
        self._store = store
        self._metrics = metrics
        self._numbers = itertools.count()
        self._sent: dict[str, Sent] = {}
        """By uid: everything that is not answered, sent or not."""
        self._uids: dict[Item, str] = {}
        self._waiting = Counter[Key]()
        """Those of `_sent` that somebody waits for: jobs come after them."""
        self._pace = Pace(lambda key: max(1, max_batch_size // key.votes))
        self._noted: tuple[Key, int, float] | None = None
        """The last batch that `_pace` was told of; each of its images brings the same."""
        self._unsent: list[list[Sent]] = []
        self._tried: list[list[Sent]] = []
        """Of the current hand-over: added or not, if Redis was asked and has not answered."""
        self._hand_over_number = 0
        self._unwanted: list[tuple[str, str]] = []
        self._wake = asyncio.Event()
        self._read = START
        self._missing = set[str]()
        """By uid: entries that Redis did not know at the last look."""
        self._elsewhere = 0
        """Entries in Redis at the last look, those of all gateways."""
        self._untaken = 0
        """Those of them that no worker had taken."""
        self._roster = Roster(store, metrics, learn)
        self._run_id: str | None = None
        self._problem: str | None = "loading"
        self._finishing = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the loops, on the running event loop."""
        loops = (("watch", self._look), ("send", self._hand_over), ("receive", self._take_answers))
        self._tasks = [asyncio.create_task(self._forever(op, step), name=f"redis-{op}") for op, step in loops]

    # --- a request's way

    def check_in_time(self, key: Key, deadline: float) -> None:
        """As `Dispatcher.check_in_time`, by how long the last batches took that were answered here.

        What waits for other gateways is not known and counts as nothing; what runs already takes its time in full,
        since nobody here knows when it began.
        """
        if not self._waiting or not self.workers:
            return
        left_s = deadline - time.monotonic()
        if left_s > self._pace.expected_s([(key, 1)]):  # else too late whoever is there
            running = self.workers * self._pace.room(key)
            self._refuse_if_late(self._pace, self._waiting, key, left_s, running=running, engines=self.workers)

    def admit(
        self,
        places: Places,
        key: Key,
        images: Sequence[Pixels],
        seeds: Sequence[int],
        deadline: float,
        spare: int = 0,
    ) -> list[Item]:
        """As every queue does; but Overloaded unless `spare` places are still free then."""
        self._check_running()
        digest = key.digest  # which a worker still takes for a while, even if it serves another one by now
        if digest not in self._roster.bundles:
            raise NotReady(f"no worker serves {key.model}")
        items = new_items(key, images, seeds, deadline)
        assert len(items) <= places.count
        self.free(places)
        if not items:
            return items
        request = [Sent(f"{self.name}-{next(self._numbers)}", item, digest, spare=spare) for item in items]
        for sent in request:
            self._sent[sent.uid], self._uids[sent.item] = sent, sent.uid
        if not spare:
            self._waiting[key] += len(request)
        self._unsent.append(request)
        self._wake.set()
        return items

    def _forget(self, items: Iterable[Item]) -> None:
        for item in items:
            uid = self._uids.pop(item, None)
            sent = None if uid is None else self._take_out(uid)
            if sent is not None and sent.entry is not None:
                self._unwanted.append((sent.digest, sent.entry))
                self._wake.set()

    def _where(self, item: Item) -> str:
        uid = self._uids.get(item)
        sent = None if uid is None else self._sent.get(uid)
        return "queue" if sent is None or sent.entry is None else "sent"

    def _answer(self, sent: Sent, outcome: Outcome) -> None:
        self._uids.pop(sent.item, None)
        self._take_out(sent.uid)
        deliver([(sent.item, outcome)])

    def _take_out(self, uid: str) -> Sent | None:
        sent = self._sent.pop(uid, None)
        if sent is not None and not sent.spare:
            self._waiting[sent.item.key] -= 1
            if not self._waiting[sent.item.key]:
                del self._waiting[sent.item.key]
        return sent

    def _check_running(self) -> None:
        if self._finishing:
            raise Draining
        if self._problem is not None:
            raise NotReady(self._problem)

    # --- the end

    def drain(self) -> None:
        """Workers are not told: others need them."""

    def finish(self) -> None:
        self._finishing = True

    async def stop(self, timeout_s: float) -> None:
        self.finish()
        ends = time.monotonic() + timeout_s
        while self._sent and self._problem is None and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        self._give_up([sent.item for sent in self._sent.values()], lambda _: Draining())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._store.withdraw(self._unwanted)
            await self._store.forget_gateway(self.name)
        except UNREACHABLE:
            logger.warning("Redis could not be told that this gateway ends")
        await self._store.close()

    # --- facts, for probes and metrics

    @property
    def workers(self) -> int:
        """How many were alive at the last look."""
        return self._roster.workers

    @property
    def depth(self) -> int:
        return self._elsewhere + sum(map(len, self._unsent)) + sum(map(len, self._tried))

    @property
    def own_depth(self) -> int:
        """Those that run are among them: only their worker knows."""
        return len(self._sent)

    @property
    def oldest_s(self) -> float:
        """By what no worker had taken at the last look: the newest. Jobs, which wait for others, are left out."""
        own = [sent for sent in self._sent.values() if not sent.spare]
        waiting = self._untaken + sum(sent.entry is None for sent in own)
        first = own[max(0, len(own) - waiting)] if own and waiting else None
        return 0.0 if first is None else time.monotonic() - first.item.enqueued_at

    @property
    def alive(self) -> bool:
        return not self._tasks or not all(task.done() for task in self._tasks)

    @property
    def busy(self) -> bool:
        return False

    @property
    def silence_s(self) -> float:
        return 0.0

    @property
    def problem(self) -> str | None:
        return self._problem

    # --- the loops

    async def _forever(self, op: str, step: Callable[[], Awaitable[None]]) -> None:
        """One step after the other; one that fails is counted, and tried again."""
        while True:
            try:
                await step()
            except UNREACHABLE as error:
                self._metrics.redis_errors.labels(op).inc()
                self._note_problem("Redis cannot be reached", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("the loop %s stumbled", op)
                await asyncio.sleep(RETRY_S)

    def _note_problem(self, problem: str | None, error: Exception | None = None) -> None:
        if problem != self._problem:
            logger.log(logging.INFO if problem is None else logging.ERROR, "%s", problem or "workers are there")
            if error is not None:
                logger.error("Redis: %s", type(error).__name__)
        self._problem = problem
        self._metrics.redis_up.set(error is None)

    async def _hand_over(self) -> None:
        """Add what was admitted, withdraw what nobody waits for. What fails is there for the next turn."""
        await self._wake.wait()
        self._wake.clear()
        self._tried += [request for request in self._unsent if self._is_wanted(request)]
        self._unsent = []
        try:
            if self._tried:
                await self._add(self._tried)
            unwanted = self._unwanted[:]
            if unwanted:
                await self._store.withdraw(unwanted)
                del self._unwanted[: len(unwanted)]
        finally:
            if self._tried or self._unwanted:
                self._wake.set()

    async def _add(self, requests: Sequence[Sequence[Sent]]) -> None:
        """One hand-over. Until Redis has answered it is asked again for the same one: it may have heard already."""
        now = time.monotonic()
        packed = [
            Request(
                request[0].uid,
                request[0].digest,
                [self._pack(sent, 1000 * (sent.item.deadline - now)) for sent in request],
                self._is_wanted(request),
                request[0].spare,
            )
            for request in requests
        ]
        added = await self._store.add(self.name, self._hand_over_number, packed, self.max_queue_size)
        self._hand_over_number += 1
        self._tried = []
        for request, result in zip(requests, added, strict=True):
            self._note_added(request, result.length, result.entries)

    def _is_wanted(self, request: Sequence[Sent]) -> bool:
        return any(sent.uid in self._sent for sent in request)

    def _pack(self, sent: Sent, left_ms: float) -> dict[bytes, bytes]:
        return pack_work(sent.uid, self.name, sent.item, left_ms)

    def _note_added(self, request: Sequence[Sent], length: int, entries: Sequence[str] | None) -> None:
        if entries is None:
            for sent in request:
                self._answer(
                    sent, Overloaded(f"{length} of {self.max_queue_size} places are taken", limit=self.max_queue_size)
                )
            return
        self._elsewhere = length
        for sent, entry in zip(request, entries, strict=True):
            sent.entry = entry
            if sent.uid not in self._sent:  # its client left while it was on the way
                self._unwanted.append((sent.digest, entry))
                self._wake.set()

    async def _take_answers(self) -> None:
        for entry, fields in await self._store.answers(self.name, self._read, ANSWERS_WAIT_MS):
            self._read = entry
            try:
                self._note_reply(unpack_reply(fields))
            except Malformed:
                logger.error("an answer in Redis cannot be read: it is left out")
                self._metrics.redis_errors.labels("malformed").inc()

    def _note_reply(self, reply: Reply) -> None:
        sent = self._sent.get(reply.uid)
        if sent is None:  # its client has left, or it was answered before
            return
        outcome = reply.outcome
        if isinstance(outcome, Completed) and not self._fits(sent, outcome):
            logger.error("an answer in Redis is none to what was asked")
            self._metrics.redis_errors.labels("malformed").inc()
            outcome = InferenceFailed()
        if isinstance(outcome, Completed):
            batch = (sent.item.key, outcome.batch_size, outcome.inference_ms / 1000)
            if batch != self._noted:
                self._pace.note(*batch)
                self._noted = batch
            waited_ms = 1000 * (time.monotonic() - sent.item.enqueued_at) - outcome.inference_ms
            outcome = Completed(
                outcome.answer, max(0.0, waited_ms), outcome.inference_ms, outcome.batch_size, outcome.stage_ms
            )
        self._answer(sent, outcome)

    def _fits(self, sent: Sent, completed: Completed) -> bool:
        bundle = self._roster.bundles.get(sent.digest)
        return bundle is None or fits(completed.answer, sent.item.key, bundle.manifest)

    async def _look(self) -> None:
        """Say that this gateway lives, see who works, and find out what Redis has lost."""
        await self._store.beat_gateway(self.name, self._read)
        run_id = await self._store.run_id()
        if self._run_id not in (None, run_id) or await self._has_lost_work():
            await self._send_again()
        self._run_id = run_id
        await self._roster.look()
        self._note_problem(None if self._roster.digests else "no worker is there")
        self._elsewhere, self._untaken = await self._store.lengths(sorted(set(self._roster.digests.values())))
        self._metrics.queue_lag.set(self._untaken)
        await asyncio.sleep(BEAT_S)

    async def _has_lost_work(self) -> bool:
        """Whether Redis does not know a bundle's oldest entry, at this look and at the last: an eviction takes all."""
        oldest = dict[str, Sent]()
        for sent in self._sent.values():
            if sent.entry is not None:
                oldest.setdefault(sent.digest, sent)
        lost = await self._store.lost([(sent.digest, sent.entry or "") for sent in oldest.values()])
        missing = {sent.uid for sent, is_lost in zip(oldest.values(), lost, strict=True) if is_lost}
        missed_again = missing & self._missing  # those of one look may have been answered a moment before
        self._missing = missing
        return bool(missed_again)

    async def _send_again(self) -> None:
        """This Redis has begun anew, or dropped what it had: what it does not know is sent to it again."""
        self._read = START
        waiting = [sent for sent in self._sent.values() if sent.entry is not None]
        lost = await self._store.lost([(sent.digest, sent.entry or "") for sent in waiting])
        again = [sent for sent, is_lost in zip(waiting, lost, strict=True) if is_lost]
        logger.warning("Redis has lost work: %d of %d images are sent again", len(again), len(waiting))
        for sent in again:
            sent.entry = None
            self._unsent.append([sent])
        self._wake.set()
