"""A sample of the traffic is run once more, undefended and scored by AID, when it has been answered.

It feeds the flip rate and the scores without a cost for every request: no request waits for it, and what would meet a
queue that is more than half full is skipped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import ClarifierError, Draining, NotReady, Overloaded, UnknownModel
from service.queue import Completed, Outcome
from service.watch.inbox import Inbox
from service.work import Answer, Classified, Detected, Key, Operation, Pixels

if TYPE_CHECKING:  # which has one of these
    from service.gateway import Gateway

logger = logging.getLogger(__name__)

GATHER_S = 0.25
"""For company: what is sampled meanwhile runs together."""
REFUSALS = (Overloaded, NotReady, Draining)
"""That Redis mode answers later."""
PRECISION = 53
"""Bits of a drawn fraction."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that was answered."""

    key: Key
    """What it was asked."""
    image: Pixels
    label: int | None
    """The index of the defended label; None where there was none, or no defense."""

    @property
    def shadow_key(self) -> Key:
        """What it is asked now: its undefended label, and its score where the bundle has an AID."""
        asked = self.key
        return Key(Operation.CLASSIFY, asked.model, explain=True, floats=asked.floats, digest=asked.digest)


class Shadow:
    """Runs the share `rate` of all images that were answered by way of `gateway`."""

    def __init__(self, gateway: Gateway, rate: float) -> None:
        self._gateway = gateway
        self._rate = rate
        self._inbox = Inbox[Sample]()

    def note(self, key: Key, image: Pixels, answer: Answer) -> None:
        """Run what was asked `key` again soon, perhaps. An `answer` that says it all by itself is not run again."""
        if isinstance(answer, Detected) or (isinstance(answer, Classified) and answer.undefended is not None):
            return
        if self._gateway.entropy.bits(PRECISION) >= self._rate * 2**PRECISION:
            return
        label = int(answer.probabilities.argmax()) if isinstance(answer, Classified) else None
        sample = Sample(key, image, None if key.defense == "none" else label)
        if not self._inbox.put(sample, image.nbytes):
            self._count("skipped", 1)

    async def run(self) -> None:
        """For ever."""
        while True:
            samples = await self._inbox.take(GATHER_S)
            most = self._gateway.settings.max_batch_size
            for key in dict.fromkeys(sample.shadow_key for sample in samples):
                alike = [sample for sample in samples if sample.shadow_key == key]
                for start in range(0, len(alike), most):
                    # A task of its own, since a reload waits for those who are inside now until they end.
                    await asyncio.create_task(self._run_batch(key, alike[start : start + most]))

    async def _run_batch(self, key: Key, samples: Sequence[Sample]) -> None:
        try:
            outcomes = await self._outcomes(key, [sample.image for sample in samples])
        except ClarifierError:  # it is for those who wait for an answer now
            self._count("skipped", len(samples))
            return
        except Exception:
            logger.exception("a sample of the traffic could not be run")
            self._count("failed", len(samples))
            return
        for sample, outcome in zip(samples, outcomes, strict=True):
            self._compare(sample, outcome)

    async def _outcomes(self, key: Key, images: Sequence[Pixels]) -> list[Outcome]:
        """Raises what a request would be refused with, and Overloaded sooner."""
        visit = self._gateway.let_in()
        try:
            queue, settings = visit.batcher, self._gateway.settings
            if self._gateway.catalog.digests.get(key.model) != key.digest:
                raise UnknownModel("it is not served any more")
            with queue.places() as places:
                queue.check_open(settings.max_queue_size // 2)
                queue.reserve(places, len(images))
                deadline = time.monotonic() + settings.request_timeout_ms / 1000
                items = queue.admit(places, key, images, [0] * len(images), deadline)
            return await queue.wait(items)
        finally:
            visit.end()

    def _compare(self, sample: Sample, outcome: Outcome) -> None:
        if not isinstance(outcome, Completed):
            self._count("skipped" if isinstance(outcome, REFUSALS) else "failed", 1)
            return
        self._count("done", 1)
        bare = outcome.answer
        assert isinstance(bare, Classified)
        metrics, bundle = self._gateway.metrics, self._gateway.catalog.bundles.get(sample.key.model)
        if bundle is not None:
            metrics.count_score(sample.key.model, bare.aid_score, bundle.manifest.aid_threshold)
        if sample.label is not None:
            bare_label = int(bare.probabilities.argmax())
            metrics.count_comparison(sample.key.model, sample.key.defense, sample.label, bare_label)

    def _count(self, outcome: str, images: int) -> None:
        self._gateway.metrics.shadowed.labels(outcome).inc(images)
