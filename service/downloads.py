"""Answers that may be large: sent at the pace of their client, and counted as memory until they are sent."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ClientLeft
from service.record import record_of
from service.settings import Settings
from service.uploads import ByteBudget

PIECE_BYTES = 64 * 1024


def sending_time_s(settings: Settings, size: int) -> float:
    """How long a client may take to receive `size` bytes: as long as to send them at the slowest pace allowed."""
    return settings.body_timeout_s * max(1, size / settings.max_image_bytes)


class Download(Response):
    """A body that is sent in pieces: the server waits for a slow client instead of buffering everything for it.

    Its bytes count against `budget`; Overloaded is raised, before the first one is sent, if there is no room. A client
    that takes longer than `timeout_s` is cut off, and counted as one that left.
    """

    def __init__(
        self, body: bytes, budget: ByteBudget, timeout_s: float, *, headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(body, headers=headers, media_type=media_type)
        self._budget = budget
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._budget.account() as account:
            account.add(len(self.body), in_memory=True)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._send(send)
            except TimeoutError:
                record_of(scope).code = ClientLeft.code

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            end = start + PIECE_BYTES
            piece = bytes(self.body[start:end])
            await send({"type": "http.response.body", "body": piece, "more_body": end < len(self.body)})
