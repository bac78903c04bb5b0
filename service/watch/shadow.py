"""A sample of the traffic is run once more, undefended and scored by AID, when it has been answered.

It feeds the flip rate and the scores without a cost for every request: no request waits for it, and what would meet a
queue that is more than half full is skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from service.errors import ClarifierError, Draining, NotReady, Overloaded
from service.queue import Completed, Outcome
from service.watch.cases import Case, run_again, run_in_batches
from service.watch.inbox import Inbox
from service.work import Answer, Classified, Detected, Key, Operation

if TYPE_CHECKING:  # which has one of these
    from service.gateway import Gateway

logger = logging.getLogger(__name__)

GATHER_S = 0.25
"""For company: what is sampled meanwhile runs together."""
REFUSALS = (Overloaded, NotReady, Draining)
"""That Redis mode answers later."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A case that is run again."""

    case: Case
    label: int | None
    """The index of the defended label; None where there was none, or no defense."""

    @property
    def shadow_key(self) -> Key:
        """What it is asked now: its undefended label, and its score where the bundle has an AID."""
        asked = self.case.key
        return Key(Operation.CLASSIFY, asked.model, explain=True, floats=asked.floats, digest=asked.digest)


class Shadow:
    """Runs the share `rate` of all images that were answered by way of `gateway`, and says which are `scored` how."""

    def __init__(self, gateway: Gateway, rate: float, scored: Callable[[Case, float | None], None]) -> None:
        self._gateway = gateway
        self._rate = rate
        self._scored = scored
        self._inbox = Inbox[Sample]()

    def note(self, case: Case, answer: Answer) -> None:
        """Run `case` again soon, perhaps. An `answer` that says it all by itself is not run again."""
        if isinstance(answer, Detected) or (isinstance(answer, Classified) and answer.undefended is not None):
            return
        if not self._gateway.entropy.happens(self._rate):
            return
        label = int(answer.probabilities.argmax()) if isinstance(answer, Classified) else None
        sample = Sample(case, None if case.key.defense == "none" else label)
        if not self._inbox.put(sample, case.image.nbytes):
            self._count("skipped", 1)

    async def run(self) -> None:
        """For ever."""
        while True:
            samples = await self._inbox.take(GATHER_S)
            most = self._gateway.settings.max_batch_size
            await run_in_batches(samples, attrgetter("shadow_key"), most, self._run_batch)

    async def _run_batch(self, key: Key, samples: Sequence[Sample]) -> None:
        try:
            outcomes = await run_again(self._gateway, key, [sample.case for sample in samples])
        except ClarifierError:  # it is for those who wait for an answer now
            self._count("skipped", len(samples))
            return
        except Exception:
            logger.exception("a sample of the traffic could not be run")
            self._count("failed", len(samples))
            return
        for sample, outcome in zip(samples, outcomes, strict=True):
            self._compare(sample, outcome)

    def _compare(self, sample: Sample, outcome: Outcome) -> None:
        if not isinstance(outcome, Completed):
            self._count("skipped" if isinstance(outcome, REFUSALS) else "failed", 1)
            return
        self._count("done", 1)
        bare = outcome.answer
        assert isinstance(bare, Classified)
        metrics, asked = self._gateway.metrics, sample.case.key
        bundle = self._gateway.catalog.bundles.get(asked.model)
        if bundle is not None:
            metrics.count_score(asked.model, bare.aid_score, bundle.manifest.aid_threshold)
        if sample.label is not None:
            bare_label = int(bare.probabilities.argmax())
            metrics.count_comparison(asked.model, asked.defense, sample.label, bare_label)
        self._scored(sample.case, bare.aid_score)

    def _count(self, outcome: str, images: int) -> None:
        self._gateway.metrics.shadowed.labels(outcome).inc(images)
