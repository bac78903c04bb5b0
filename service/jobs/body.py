"""The body of a request as it comes: in memory is only what nobody has read of it yet."""

from __future__ import annotations

import asyncio
import time

from fastapi import Request

from service.errors import BodyTooLarge, BodyTooSlow, ClarifierError, ClientLeft, EmptyBody
from service.request_headers import headers_of

MIN_BYTES_PER_S = 64 * 1024
"""The slowest pace, on average, at which a body may come."""


class Body:
    """Reads a body of at most `limit` bytes, in pieces. One that ends too early is `malformed`.

    Every method raises EmptyBody, BodyTooLarge, BodyTooSlow and ClientLeft.
    """

    def __init__(self, request: Request, limit: int, timeout_s: float, malformed: type[ClarifierError]) -> None:
        self._request = request
        self.limit = limit
        self._timeout_s = timeout_s
        self._malformed = malformed
        self._waited_s = 0.0
        self._buffer = bytearray()
        self._ended = False
        self.size = 0
        """Bytes that have come."""
        declared = headers_of(request.scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise BodyTooLarge(f"the body may have {limit} bytes", limit=limit, actual=int(declared))

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        while len(self._buffer) < count:
            await self._more()
        return self._take(count)

    async def some(self) -> bytes:
        """What has come, at least a byte."""
        while not self._buffer:
            await self._more()
        return self._take(len(self._buffer))

    async def before(self, delimiter: bytes, limit: int) -> bytes | None:
        """What stands before `delimiter`, which is read too; None, and nothing is read, if that is over `limit`."""
        searched = 0
        while (found := self._buffer.find(delimiter, searched)) < 0 and len(self._buffer) < limit + len(delimiter):
            searched = max(0, len(self._buffer) - len(delimiter) + 1)
            await self._more()
        if not 0 <= found <= limit:
            return None
        content = self._take(found)
        self._take(len(delimiter))
        return content

    async def skip(self, count: int) -> None:
        """Read `count` bytes that nobody wants."""
        while len(self._buffer) < count:
            count -= len(self._buffer)
            self._buffer.clear()
            await self._more()
        self._take(count)

    async def skip_past(self, delimiter: bytes) -> None:
        """Read all up to `delimiter`, and that."""
        while (found := self._buffer.find(delimiter)) < 0:
            self._take(max(0, len(self._buffer) - len(delimiter) + 1))
            await self._more()
        self._take(found + len(delimiter))

    async def skip_rest(self) -> None:
        """Read to the end: a connection with unread bytes could not be used again."""
        while not self._ended:
            self._buffer.clear()
            await self._receive()

    def unread(self, data: bytes) -> None:
        """Put back what was read last."""
        self._buffer[:0] = data

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def _more(self) -> None:
        if self._ended:
            raise self._malformed("the body ends too early")
        await self._receive()

    async def _receive(self) -> None:
        ahead_s = self.size / MIN_BYTES_PER_S - self._waited_s
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s + min(0.0, ahead_s)):
                message = await self._request.receive()
        except TimeoutError:
            pace = f"{MIN_BYTES_PER_S // 1024} KiB a second, and something every {self._timeout_s:g} s"
            raise BodyTooSlow(f"a body must bring {pace}") from None
        self._waited_s += time.monotonic() - began
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk = message.get("body", b"")
        self._ended = not message.get("more_body", False)
        self.size += len(chunk)
        if self.size > self.limit:
            raise BodyTooLarge(f"the body may have {self.limit} bytes", limit=self.limit)
        if self._ended and not self.size:
            raise EmptyBody
        self._buffer += chunk
