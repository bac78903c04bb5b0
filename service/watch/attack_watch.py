"""What looks at traffic beside the requests: near-duplicates, a sample that is run undefended, and evidence."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.access import key_of, owner_of
from service.queue import Completed, Outcome
from service.watch.cases import Case
from service.watch.evidence import Evidence, check_evidence
from service.watch.families import Families
from service.watch.shadow import Shadow
from service.watch.similarity import Query, SimilarityWatch
from service.work import Pixels, Purified

if TYPE_CHECKING:  # which has one of these
    from service.gateway import Gateway


NO_KEY = "(none)"
"""No key is called so."""


class AttackWatch:
    """What of it is on; `run` each of its `loops`."""

    def __init__(self, gateway: Gateway, families: Families) -> None:
        settings = gateway.settings
        self._gateway = gateway
        self._similarity = (
            SimilarityWatch(settings.similarity_limit, families, gateway.metrics, gateway.decoders)
            if settings.similarity_limit
            else None
        )
        self._shadow = Shadow(gateway, settings.shadow_rate, self._note_score) if settings.shadow_rate else None
        recipient = check_evidence(settings)
        self._evidence = None if recipient is None else Evidence(gateway, recipient)

    def note_queries(self, scope: Scope, images: Sequence[Pixels]) -> None:
        """The client of the request `scope` asks about these images."""
        if self._similarity is None:
            return
        who, key = owner_of(scope), key_of(scope)
        for image in images:
            self._similarity.note(Query(who, NO_KEY if key is None else key.name, image))

    def note_outcomes(self, cases: Sequence[Case], outcomes: Sequence[Outcome]) -> None:
        """This became of them."""
        for case, outcome in zip(cases, outcomes, strict=True):
            if not isinstance(outcome, Completed):
                continue
            if self._shadow is not None:
                self._shadow.note(case, outcome.answer)
            if not isinstance(outcome.answer, Purified):
                self._note_score(case, outcome.answer.aid_score)

    def _note_score(self, case: Case, score: float | None) -> None:
        if self._evidence is None or score is None:
            return
        bundle = self._gateway.catalog.bundles.get(case.key.model)
        threshold = None if bundle is None else bundle.manifest.aid_threshold
        if threshold is not None and score < threshold:
            self._evidence.note(case, score)

    def loops(self) -> list[Coroutine[None, None, None]]:
        """For tasks that live as long as the application."""
        loops = [part.run() for part in (self._similarity, self._shadow, self._evidence) if part is not None]
        return loops if self._evidence is None else [*loops, self._evidence.sweep()]
