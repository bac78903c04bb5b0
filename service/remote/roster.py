"""Which workers live, and which bundles they serve, as one gateway learns it from Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.manifest import Manifest
from service.metrics import Metrics
from service.remote.store import Announcement, Store
from service.repository import Catalog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteBundle:
    """What a worker says of a bundle that it serves."""

    manifest: Manifest
    digest: str
    report: Mapping[str, object]


class Roster:
    """What was true at the last look. `learn` is told of the bundles whenever they change."""

    def __init__(self, store: Store, metrics: Metrics, learn: Callable[[Catalog], None]) -> None:
        self.workers = 0
        self.digests: dict[str, str] = {}
        """By `name@version`: what is served."""
        self.bundles: dict[str, RemoteBundle] = {}
        """By digest: everything that was ever served, since a worker may still have it."""
        self._undescribed: Mapping[str, str] = {}
        """Digests by name: what workers serve, and nobody knows what it is."""
        self._store = store
        self._metrics = metrics
        self._learn = learn

    async def look(self) -> None:
        """Learn what living workers serve. Where two disagree on a bundle, what more of them have is asked for."""
        roster = await self._store.roster()
        self.workers = len(roster)
        served = [(name, digest) for says in roster.values() for name, digest in says.bundles.items()]
        names = sorted({name for name, _ in served})
        digests = {
            name: max(sorted({d for n, d in served if n == name}), key=lambda d: served.count((name, d)))
            for name in names
        }
        if digests != self.digests:
            await self._describe(digests, roster)

    async def _describe(self, digests: Mapping[str, str], roster: Mapping[str, Announcement]) -> None:
        bundles = dict[str, RemoteBundle]()
        for name, digest in digests.items():
            known = self.bundles.get(digest) or await self._fetch(digest)
            if known is not None:
                self.bundles[digest] = bundles[name] = known
        self._note_undescribed({name: digest for name, digest in digests.items() if name not in bundles})
        described = {name: bundle.digest for name, bundle in bundles.items()}
        if described == self.digests:  # what cannot be served now could not be before
            return
        devices = {name: {says.device for says in roster.values() if name in says.bundles} for name in bundles}
        self._metrics.note_bundles(described, devices)
        self.digests = described
        self._learn(Catalog(bundles))
        logger.info("served by %d workers: %s", len(roster), ", ".join(bundles) or "nothing")

    def _note_undescribed(self, undescribed: Mapping[str, str]) -> None:
        if undescribed != self._undescribed:
            for name, digest in undescribed.items():
                logger.error("Redis does not tell what %s is: %.12s is left out", name, digest)
        self._undescribed = undescribed

    async def _fetch(self, digest: str) -> RemoteBundle | None:
        try:
            described = await self._store.bundle(digest)
            if described is None:
                return None
            return RemoteBundle(Manifest.model_validate(described["manifest"]), digest, described["report"])
        except (KeyError, RecursionError, TypeError, ValueError):  # pydantic's and JSON's are ValueErrors
            return None
