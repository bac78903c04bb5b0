"""Many waiting requests become a few batches.

`BatchQueue` decides who goes next. `Batcher` gives it a lock, an engine thread that takes batches and runs them, and
futures that the event loop waits on. A batch's answers come back in one call on the event loop.

What holds for every admitted item: it is answered exactly once, or its client has left. Expired items and
those whose client left never reach the engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from service.dispatch import Dispatcher, Places, deliver, new_items
from service.errors import ClarifierError, DeadlineExceeded, Draining, InferenceFailed, NotFinite, NotReady
from service.metrics import Metrics
from service.pace import Pace
from service.queue import BatchQueue, Completed, Item, Outcome
from service.tracing import Tracing
from service.work import EngineFault, Key, Pixels, Ran

logger = logging.getLogger(__name__)

IDLE_BEAT_S = 0.5
"""How often the engine thread shows that it is alive while there is nothing to do."""

RunBatch = Callable[[Key, Sequence[Pixels], Sequence[int]], Ran]
"""Outcomes in the order of the images; an image can fail alone with the error in its place."""


class Batcher(Dispatcher):
    """One queue and one engine thread in this process."""

    def __init__(
        self,
        run_batch: RunBatch,
        *,
        engine_name: str,
        max_batch_size: int,
        max_queue_delay_ms: float,
        max_queue_size: int,
        max_queue_wait_ms: float,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        super().__init__(max_queue_size, max_queue_wait_ms)
        self._run_batch = run_batch
        self._engine_name = engine_name
        self._metrics = metrics
        self._tracing = tracing
        metrics.expect_errors(engine_name)
        self._queue = BatchQueue(max_batch_size, max_queue_delay_ms / 1000)
        self._coming: list[Item] = []
        """Admitted in this turn of the event loop, whose thread alone uses it."""
        self._pace = Pace(self._queue.room)
        self._changed = threading.Condition()
        self._running: list[Item] = []
        self._running_since = 0.0
        self._hurrying = False
        self._finishing = False
        self._ended = False
        """Whether the engine thread has."""
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- the event loop's side

    def start(self) -> None:
        """Start the engine thread; answers go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def check_in_time(self, key: Key, deadline: float) -> None:
        """As `Dispatcher.check_in_time`, by how long the last batches took."""
        if not self._running and not self.depth:
            return
        now = time.monotonic()
        left_s = deadline - now
        with self._changed:
            if left_s <= self._pace.expected_s([(key, 1)]):  # too late whoever is there
                return
            ran_s = now - self._running_since
            running = [(item.key, len(self._running)) for item in self._running[:1]]
            running_s = max(0.0, self._pace.expected_s(running) - ran_s)
            waiting = Counter(dict(self._queue.counts()))
            waiting.update(item.key for item in self._coming)
            self._refuse_if_late(self._pace, waiting, key, left_s, running_s=running_s)

    def admit(
        self, places: Places, key: Key, images: Sequence[Pixels], seeds: Sequence[int], deadline: float
    ) -> list[Item]:
        items = new_items(key, images, seeds, deadline)
        assert len(items) <= places.count
        self._check_running()
        self.free(places)
        if items and not self._coming:
            asyncio.get_running_loop().call_soon(self._let_in)
        self._coming += items
        return items

    def _let_in(self) -> None:
        """Into the queue with what this turn of the event loop has admitted.

        All at once: requests that come together are one batch, where the engine would else begin with the first.
        """
        coming, self._coming = self._coming, []
        with self._changed:
            was_empty = not self._queue.depth
            self._queue.add(coming)
            if was_empty or any(self._queue.is_full(key) for key in {item.key for item in coming}):
                self._changed.notify()  # else the engine thread has nothing new to decide
        if coming and self._ended:
            self.abandon(NotReady("the engine has stopped"))

    def _where(self, item: Item) -> str:
        return "running" if item in self._running else "queue"

    def _forget(self, items: Iterable[Item]) -> None:
        forgotten = set(items)
        self._coming = [item for item in self._coming if item not in forgotten]
        with self._changed:
            for item in forgotten:
                self._queue.discard(item)

    def drain(self) -> None:
        with self._changed:
            self._hurrying = True
            self._changed.notify()

    def finish(self) -> None:
        """Nobody else will come: the engine thread ends when the queue is empty."""
        self._let_in()
        self.drain()
        with self._changed:
            self._finishing = True
            self._changed.notify()

    async def stop(self, timeout_s: float) -> None:
        self.finish()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s)
        self.abandon(Draining())

    def abandon(self, error: ClarifierError) -> None:
        """Answer `error` to everybody who waits or runs."""
        with self._changed:
            items = [*self._coming, *self._queue.clear(), *self._running]
        self._coming = []
        deliver([(item, error) for item in items])

    # --- facts, for probes and metrics

    @property
    def depth(self) -> int:
        return self._queue.depth + len(self._coming)

    @property
    def own_depth(self) -> int:
        return self.depth

    @property
    def oldest_s(self) -> float:
        with self._changed:
            since = self._queue.oldest_since
        since = min((item.enqueued_at for item in self._coming[:1]), default=None) if since is None else since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self._beat if self._thread.is_alive() else math.inf

    @property
    def problem(self) -> str | None:
        return None

    def _check_running(self) -> None:
        if self._finishing:
            raise Draining
        if self._ended:
            raise NotReady("the engine has stopped")

    # --- the engine thread's side

    def _work(self) -> None:
        """Turn after turn until nobody waits or will come. A turn that fails is logged, and the next one comes."""
        try:
            while not (self._finishing and not self._queue.depth):
                try:
                    self._turn()
                except Exception:
                    logger.exception("the batch loop stumbled")
                    time.sleep(0.01)
        finally:
            self._ended = True
            error = Draining() if self._finishing else NotReady("the engine has stopped")
            self._call_on_loop(lambda: self.abandon(error))

    def _turn(self) -> None:
        batch = self._next_batch()
        self._beat = time.monotonic()
        try:
            self._answer(batch)
        except BaseException:  # whatever happened, nobody is left waiting
            self._hand_over([(item, InferenceFailed()) for item in batch])
            raise
        finally:
            self._running = []
            self._beat = time.monotonic()

    def _next_batch(self) -> list[Item]:
        """Wait until a batch should run, or for a beat; empty if it was only a beat."""
        with self._changed:
            now = time.monotonic()
            batch = self._queue.take(now, at_once=self._hurrying)
            if not batch and not self._finishing:
                wait_s = self._queue.wait_s(now)
                self._changed.wait(IDLE_BEAT_S if wait_s is None else min(wait_s, IDLE_BEAT_S))
                batch = self._queue.take(time.monotonic(), at_once=self._hurrying)
            self._running_since = time.monotonic()
            self._running = batch  # while the lock is held, so that `abandon` finds every item somewhere
        if batch:
            self._metrics.batches.labels(self._why(batch)).inc()
        return batch

    def _why(self, batch: Sequence[Item]) -> str:
        """The reason why `batch` has left the queue."""
        if len(batch) >= self._queue.room(batch[0].key):
            return "size"
        return "drain" if self._hurrying else "delay"

    def _answer(self, batch: list[Item]) -> None:
        """Answer everybody: too late, or the outcome of a run; one by one, each as it ends, if the run fails."""
        now = time.monotonic()
        self._hand_over([(item, DeadlineExceeded()) for item in batch if now >= item.deadline])
        wanted = [item for item in batch if now < item.deadline and not item.future.done()]
        if not wanted:
            return
        try:
            self._hand_over(self._run(wanted))
        except Exception as error:
            self._note_failure(wanted, error)
            if len(wanted) == 1:
                self._hand_over([(wanted[0], InferenceFailed())])
                return
            for item in wanted:
                self._answer([item])
                self._beat = time.monotonic()

    def _run(self, batch: list[Item]) -> list[tuple[Item, Outcome]]:
        started = time.monotonic()
        ran = self._run_batch(batch[0].key, [item.image for item in batch], [item.seed for item in batch])
        pairs = list(zip(batch, ran.outcomes, strict=True))
        seconds = time.monotonic() - started
        with self._changed:
            self._pace.note(batch[0].key, len(batch), seconds)
        inference_ms = 1000 * seconds
        self._metrics.count_batch(batch[0].key, len(batch), seconds, ran.stage_ms)
        if self._tracing is not None:
            self._tracing.note_batch(batch[0].key, [item.traceparent for item in batch], started, ran.stage_ms)
        for outcome in ran.outcomes:
            if isinstance(outcome, NotFinite):
                self._metrics.engine_errors.labels(self._engine_name, "nan").inc()
        return [
            (item, outcome)
            if isinstance(outcome, ClarifierError)
            else (
                item,
                Completed(outcome, 1000 * (started - item.enqueued_at), inference_ms, len(batch), ran.stage_ms),
            )
            for item, outcome in pairs
        ]

    def _note_failure(self, batch: list[Item], error: Exception) -> None:
        kind = error.kind if isinstance(error, EngineFault) else "other"
        self._metrics.engine_errors.labels(self._engine_name, kind).inc()
        logger.error("a batch of %d (%s) failed", len(batch), batch[0].key, exc_info=error)

    def _hand_over(self, outcomes: Sequence[tuple[Item, Outcome]]) -> None:
        if outcomes:
            self._call_on_loop(lambda: deliver(outcomes))

    def _call_on_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)
