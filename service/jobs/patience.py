"""With a Redis that cannot be reached: what fails is counted, said once, and tried again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.metrics import Metrics
from service.remote.store import UNREACHABLE

logger = logging.getLogger(__name__)

RETRY_S = 0.2

R = TypeVar("R")


class Patience:
    """Of one gateway's work on jobs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._said = set[str]()

    async def until_done(self, step: Callable[[], Awaitable[R]]) -> R:
        """What `step` answers as soon as Redis can be reached."""
        while True:
            try:
                return await step()
            except UNREACHABLE as error:
                self.note(error)
                await asyncio.sleep(RETRY_S)

    def note(self, error: BaseException) -> None:
        """Redis could not be reached."""
        self._metrics.redis_errors.labels("jobs").inc()
        for kind in _kinds(error) - self._said:
            logger.error("Redis (jobs): %s", kind)
            self._said.add(kind)

    def forget(self) -> None:
        """Redis answers: the next error is news."""
        self._said.clear()


def _kinds(error: BaseException) -> set[str]:
    """The name of an error's type; of a group those of its members."""
    if isinstance(error, BaseExceptionGroup):
        return {kind for each in error.exceptions for kind in _kinds(each)}
    return {type(error).__name__}
