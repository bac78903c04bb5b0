"""What is counted and logged of every request, for all that have ended in one turn of the event loop together.

Between requests the code that does it would be out of the processor's caches each time.
"""

from __future__ import annotations

import asyncio
import logging

from service.logs import log_request
from service.metrics import Metrics
from service.record import Record
from service.tracing import Tracing

logger = logging.getLogger(__name__)


class Books:
    """Of one application; the event loop's thread alone uses it."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._ended = list[Record]()

    def enter(self, record: Record) -> None:
        """A request has ended now: it was answered, or its client has left."""
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._write)
        record.end()
        self._ended.append(record)

    def _write(self) -> None:
        ended, self._ended = self._ended, []
        for record in ended:
            try:
                self._metrics.count_request(record)
                log_request(record)
                if self._tracing is not None:
                    self._tracing.end(record)
            except Exception:  # the others are written all the same
                logger.exception("a request could not be written down")
