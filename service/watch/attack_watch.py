"""What looks at traffic beside the requests: near-duplicates, and a sample that is run undefended."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.access import key_of, owner_of
from service.queue import Completed, Outcome
from service.watch.families import Families
from service.watch.shadow import Shadow
from service.watch.similarity import Query, SimilarityWatch
from service.work import Key, Pixels

if TYPE_CHECKING:  # which has one of these
    from service.gateway import Gateway


NO_KEY = "(none)"
"""No key is called so."""


class AttackWatch:
    """What of it is on; `run` each of its `loops`."""

    def __init__(self, gateway: Gateway, families: Families) -> None:
        settings = gateway.settings
        self._similarity = (
            SimilarityWatch(settings.similarity_limit, families, gateway.metrics, gateway.decoders)
            if settings.similarity_limit
            else None
        )
        self._shadow = Shadow(gateway, settings.shadow_rate) if settings.shadow_rate else None

    def note_queries(self, scope: Scope, images: Sequence[Pixels]) -> None:
        """The client of the request `scope` asks about these images."""
        if self._similarity is None:
            return
        who, key = owner_of(scope), key_of(scope)
        for image in images:
            self._similarity.note(Query(who, NO_KEY if key is None else key.name, image))

    def note_outcomes(self, key: Key, images: Sequence[Pixels], outcomes: Sequence[Outcome]) -> None:
        """They were asked `key`, and this became of them."""
        if self._shadow is None:
            return
        for image, outcome in zip(images, outcomes, strict=True):
            if isinstance(outcome, Completed):
                self._shadow.note(key, image, outcome.answer)

    def loops(self) -> list[Coroutine[None, None, None]]:
        """For tasks that live as long as the application."""
        return [part.run() for part in (self._similarity, self._shadow) if part is not None]
