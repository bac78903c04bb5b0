"""What the routes share: one object per application, filled while it starts, and asked what is true now."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from service.access import Access
from service.cache import AnswerCache
from service.dispatch import Dispatcher
from service.entropy import Entropy
from service.errors import Draining, NotReady, UnknownModel
from service.memory import UNLIMITED, Memory
from service.metrics import Metrics
from service.repository import Catalog
from service.settings import Settings
from service.tracing import Tracing
from service.uploads import ByteBudget

if TYPE_CHECKING:  # the first needs redis, which memory mode does not load, the second httpx2
    from service.jobs.board import Board
    from service.oip.predictor import Predictor
    from service.watch.attack_watch import AttackWatch

STALE_BEAT_S = 2.0
"""An engine with nothing to do that is silent for longer is not ready."""


@dataclass
class Gateway:
    """Settings, metrics, decoders, randomness, keys; once loaded, the catalog and what leads to the engine."""

    settings: Settings
    metrics: Metrics
    decoders: ThreadPoolExecutor
    uploads: ByteBudget
    entropy: Entropy
    cache: AnswerCache | None = None
    """None while it is off."""
    access: Access | None = None
    """None if everybody may ask as often as they like."""
    watch: AttackWatch | None = None
    """None while nobody looks."""
    predictor: Predictor | None = None
    """None unless this is its transformer."""
    memory: Memory = UNLIMITED
    tracing: Tracing | None = None
    """None where there are no traces."""
    jobs: Board | None = None
    """None where there are none: they need a queue in Redis."""
    catalog: Catalog = field(default_factory=lambda: Catalog({}))
    batcher: Dispatcher | None = None
    draining: bool = False
    """Set by the first SIGTERM: not ready any more, though work is accepted until the drain delay is over."""
    failure: str = ""
    """Why loading ended without an engine."""
    reload_asked: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set to have the model repository looked at again."""
    _drain_ends: float | None = field(default=None, init=False)
    """A reading of the monotonic clock; None while new requests are let in."""
    _abandoned: bool = field(default=False, init=False)
    _in_flight: set[asyncio.Task[object]] = field(default_factory=set, init=False)

    def let_in(self) -> Visit:
        """The request of this task: from now on it is answered even if a drain begins, whatever it is doing then.

        Raises NotReady, Draining or Overloaded if a new image would not be admitted now.
        """
        return Visit(self, self._open_batcher())

    def _open_batcher(self) -> Dispatcher:
        if self._drain_ends is not None:
            raise Draining
        if self.batcher is None or not self.catalog.bundles:
            raise NotReady(self.why_not_ready() or "")
        self.batcher.check_open()
        return self.batcher

    def reload(self) -> None:
        """Read again what is on disk: keys at once, bundles as soon as none are being loaded."""
        if self.draining:
            return
        if self.access is not None and self.settings.api_keys_file is not None:
            self.access.read_again(self.settings.api_keys_file)
        self.reload_asked.set()

    async def those_inside_leave(self) -> None:
        """Until everybody who is let in now is answered."""
        if self._in_flight:
            await asyncio.wait(set(self._in_flight))

    def begin_drain(self) -> None:
        """Refuse new requests from now on; the engine ends when those that were let in are answered."""
        self.draining = True
        if self._drain_ends is None:
            self._drain_ends = time.monotonic() + self.settings.drain_timeout_s
        if self.batcher is not None:
            self.batcher.drain()
        self._finish_if_empty()

    def drain_left_s(self) -> float:
        """Seconds until whoever is left is abandoned."""
        return 0.0 if self._drain_ends is None else max(0.0, self._drain_ends - time.monotonic())

    def abandon(self) -> None:
        """The drain time is over: answer 503 to whoever is left."""
        self._abandoned = True
        for task in self._in_flight:
            task.cancel()

    def _finish_if_empty(self) -> None:
        if self._drain_ends is not None and not self._in_flight and self.batcher is not None:
            self.batcher.finish()

    def why_not_ready(self) -> str | None:
        """The reason not to send requests here, from facts of this moment; None if there is none.

        A full queue is not a reason: taking this replica out would push its load onto the others.
        """
        if self.draining:
            return "draining"
        if self.batcher is None:
            return self.failure or "loading"
        if (problem := self.batcher.problem) is not None:
            return problem
        if not self.catalog.bundles:
            return "no bundle is loaded"
        if not self._has_default_model():
            return f"the default model {self.settings.default_model} is not loaded"
        patience_s = self.settings.request_timeout_ms / 1000 if self.batcher.busy else STALE_BEAT_S
        return "the engine is silent" if self.batcher.silence_s > patience_s else None

    @property
    def engine_died(self) -> bool:
        """Whether the engine thread has ended though nobody asked it to: only another process can help."""
        return self.batcher is not None and not self.batcher.alive and not self.draining

    def _has_default_model(self) -> bool:
        try:
            self.catalog.find(self.settings.default_model)
        except UnknownModel:
            return False
        return True

    def why_not_live(self) -> str | None:
        """The reason to restart this process; None if there is none. Bundles and devices are none."""
        if self.draining or self.batcher is None:
            return None
        silent = self.batcher.silence_s > 3 * self.settings.request_timeout_ms / 1000
        return "the engine is silent" if silent else None


class Visit:
    """A request that was let in, until `end`."""

    __slots__ = ("_gateway", "_task", "batcher")

    def __init__(self, gateway: Gateway, batcher: Dispatcher) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.batcher = batcher
        self._gateway, self._task = gateway, task
        gateway._in_flight.add(task)

    def end(self, error: object = None) -> None:
        """It is answered, or `error` ends it. Raises Draining where that is the end of the drain time."""
        self._gateway._in_flight.discard(self._task)
        self._gateway._finish_if_empty()
        if isinstance(error, asyncio.CancelledError) and self._gateway._abandoned and self._task.uncancel() == 0:
            raise Draining from None


def gateway_of(request: Request) -> Gateway:
    """The gateway of the application that answers `request`."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
