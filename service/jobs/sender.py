"""Sends the images of jobs through a gateway's own queue, and keeps what becomes of them.

Jobs leave half of the queue, and of what workers do next most, to those who wait for their answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence

from models.manifest import Manifest, UnknownDefense
from service.answers import classify_response
from service.errors import ClarifierError, DeadlineExceeded, InferenceFailed, NotFinite, NotReady
from service.gateway import Gateway
from service.images import encode_image
from service.jobs.patience import RETRY_S, Patience
from service.jobs.records import Found, Input, Spec, pack_entry, unpack_inputs
from service.jobs.store import Answered, JobStore
from service.problems import problem_of
from service.queue import Completed, Outcome
from service.record import Record
from service.remote.queue import RemoteQueue
from service.remote.wire import Malformed
from service.repository import DescribedBundle
from service.schemas import PurifiedImage, Timing
from service.work import Classified, Purified

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""For each worker: one that runs, and one that is there when it ends."""
DEADLINES = 10
"""An image of a job may take so many times the longest deadline of a request."""
MAX_LATE = 3
"""So often it may take longer, with workers there, before that is its answer."""
FINAL = (InferenceFailed, NotFinite)
"""Errors that another try would not cure."""

Settled = tuple[Input, Completed | ClarifierError]


class Sender:
    """Of one gateway, for all jobs that it works on."""

    def __init__(self, gateway: Gateway, queue: RemoteQueue, store: JobStore, patience: Patience) -> None:
        self._gateway = gateway
        self._metrics = gateway.metrics
        self._queue = queue
        self._store = store
        self._patience = patience
        self._under_way = 0
        """Images of jobs in the queue."""
        self._freed = asyncio.Event()
        settings = gateway.settings
        self._spare = settings.max_queue_size // 2
        """Places in the queue that are never a job's."""
        self._part = max(1, min(settings.max_batch_size, (settings.max_queue_size - self._spare) // 2))
        """Images that are sent together."""

    async def work(self, found: Found) -> None:
        """Send what has no answer, part by part, as fast as there is room. Raises Malformed."""
        logger.info("works on job %s: %d of %d images are done", found.spec.id, found.done, found.spec.images)
        parts = set[asyncio.Task[None]]()
        manifest = (await self._served(found.spec)).manifest
        async with asyncio.TaskGroup() as group:
            async for part in self._parts(found.spec):
                while parts and len(parts) * self._part >= self._window():
                    await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                task = group.create_task(self._settle(found.spec, manifest, part))
                parts.add(task)
                task.add_done_callback(parts.discard)

    async def _parts(self, spec: Spec) -> AsyncIterator[list[Input]]:
        """The images that have no answer, while their model is served."""
        answered = await self._patience.until_done(lambda: self._store.answered(spec.id))
        for numbers in spec.chunks:
            missing = [number for number in numbers if number not in answered]
            if not missing:
                continue
            await self._served(spec)
            inputs = await self._inputs(spec, numbers)
            lost = [number for number in missing if number not in inputs]
            if lost and not await self._note_lost(spec, lost):
                return
            here = [inputs[number] for number in missing if number in inputs]
            for start in range(0, len(here), self._part):
                yield here[start : start + self._part]

    async def _served(self, spec: Spec) -> DescribedBundle:
        """The bundle, as soon as a worker serves it."""
        while (bundle := self._bundle(spec)) is None:
            await asyncio.sleep(RETRY_S)
        return bundle

    async def _inputs(self, spec: Spec, numbers: range) -> dict[int, Input]:
        """A chunk, empty if it is gone or cannot be read."""
        chunk = await self._patience.until_done(lambda: self._store.inputs(spec.id, numbers.start))
        try:
            return {} if chunk is None else unpack_inputs(chunk, numbers, spec.input_size)
        except Malformed:
            return {}

    async def _note_lost(self, spec: Spec, numbers: Sequence[int]) -> bool:
        """Answer images whose input is gone; False if the whole job is."""
        error = problem_of(InferenceFailed("the prepared image was lost"), spec.request_id)
        answers = [Answered(number, pack_entry(error), failed=True) for number in numbers]
        if not await self._record(spec, answers):
            return False
        logger.error("images of a job in Redis cannot be read: they are answered with a problem")
        self._metrics.redis_errors.labels("malformed").inc()
        return True

    async def _settle(self, spec: Spec, manifest: Manifest, part: Sequence[Input]) -> None:
        """Send images until each has an answer that counts, and keep those."""
        late = 0
        while part:
            outcomes = list(zip(part, await self._ask(spec, part), strict=True))
            if self._queue.problem is None and any(isinstance(outcome, DeadlineExceeded) for _, outcome in outcomes):
                late += 1
            final = FINAL if late < MAX_LATE else (*FINAL, DeadlineExceeded)
            settled = [(each, outcome) for each, outcome in outcomes if isinstance(outcome, (Completed, *final))]
            if settled:
                await self._record(spec, await self._answers(spec, manifest, settled))
            part = [each for each, outcome in outcomes if not isinstance(outcome, (Completed, *final))]
            if part:
                await asyncio.sleep(RETRY_S)

    async def _ask(self, spec: Spec, part: Sequence[Input]) -> Sequence[Outcome]:
        """What becomes of images in the queue, once there is room for them."""
        while self._under_way and self._under_way + len(part) > self._window():
            self._freed.clear()
            await self._freed.wait()
        self._under_way += len(part)
        try:
            return await self._send(spec, part)
        except ClarifierError as error:
            return [error] * len(part)
        finally:
            self._under_way -= len(part)
            self._freed.set()

    async def _send(self, spec: Spec, part: Sequence[Input]) -> list[Outcome]:
        if self._bundle(spec) is None:
            raise NotReady
        deadline = time.monotonic() + DEADLINES * self._gateway.settings.request_timeout_ms / 1000
        pixels, seeds = [each.pixels for each in part], [each.seed for each in part]
        with self._queue.places() as places:
            self._queue.check_open(len(part) + self._spare)
            self._queue.reserve(places, len(part))
            items = self._queue.admit(places, spec.key, pixels, seeds, deadline, spare=self._spare)
        return await self._queue.wait(items)

    def _bundle(self, spec: Spec) -> DescribedBundle | None:
        """The one that the job was made for; None while no worker serves it. Raises Malformed."""
        bundle = self._gateway.catalog.bundles.get(spec.model)
        if bundle is None or bundle.digest != spec.digest:
            return None
        try:
            sound = self._gateway.catalog.chain(spec.model, spec.defense).defense == spec.defense
        except UnknownDefense:
            sound = False
        if not sound or bundle.manifest.input_size != spec.input_size:
            raise Malformed("the bundle does not know what it asks for")
        return bundle

    def _window(self) -> int:
        """Images of jobs that may be in the queue from here."""
        batches = BATCHES_AHEAD * self._gateway.settings.max_batch_size * max(1, self._queue.workers)
        return max(self._part, min(batches, self._gateway.settings.max_queue_size - self._spare))

    # --- its answers

    async def _answers(self, spec: Spec, manifest: Manifest, settled: Sequence[Settled]) -> list[Answered]:
        """Packed in a thread: pictures are encoded, and many classifications take as long."""

        def pack() -> list[Answered]:
            return [
                Answered(each.number, self._pack(spec, manifest, each, outcome), isinstance(outcome, ClarifierError))
                for each, outcome in settled
            ]

        return await asyncio.get_running_loop().run_in_executor(self._gateway.decoders, pack)

    def _pack(self, spec: Spec, manifest: Manifest, each: Input, outcome: Completed | ClarifierError) -> bytes:
        if isinstance(outcome, ClarifierError):
            self._metrics.count_refusal(outcome.code, outcome.status)
            return pack_entry(problem_of(outcome, spec.request_id))
        answer = outcome.answer
        record = Record(spec.request_id, model=spec.model, defense=spec.defense)
        self._metrics.count_answer(record, answer, manifest.classes, manifest.aid_threshold)
        if isinstance(answer, Purified):
            entry = PurifiedImage(
                status=200,
                file=f"{each.number}.png",
                linf=round(answer.linf, 6),
                seed=each.seed,
                degraded=answer.degraded,
            )
            return pack_entry(entry, encode_image(answer.image, "image/png"))
        assert isinstance(answer, Classified)
        return pack_entry(
            classify_response(
                answer,
                manifest,
                key=spec.key,
                digest=spec.digest,
                request_id=spec.request_id,
                top_k=spec.top_k,
                seed=each.seed,
                timing_ms=_timing(each, outcome),
            )
        )

    async def _record(self, spec: Spec, answers: Sequence[Answered]) -> bool:
        """Keep answers; False if there is no such job any more."""
        recorded = await self._patience.until_done(lambda: self._store.record(spec, answers))
        if recorded is None:
            return False
        new, failed = recorded
        self._metrics.job_images.labels("done").inc(new - failed)
        self._metrics.job_images.labels("failed").inc(failed)
        return True


def _timing(each: Input, completed: Completed) -> Timing:
    total = each.decode_ms + completed.queue_ms + completed.inference_ms
    return Timing(
        decode=round(each.decode_ms, 3),
        queue=round(completed.queue_ms, 3),
        inference=round(completed.inference_ms, 3),
        total=round(total, 3),
    )
