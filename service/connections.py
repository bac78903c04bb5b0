"""HTTP as uvicorn reads it, with limits for what it reads before there is a request to answer.

A head that grows or dawdles, and a connection that never asks anything, end here. All of them are answered in one line
of text, since what is not a whole request has no answer of its own, and counted. Another protocol that a client offers
is not taken up: its request is answered as if it had not (RFC 9110, section 7.8).
"""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar

from httptools import HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.departure import DEPARTURE, Departure
from service.metrics import Metrics
from service.uploads import WHOLE

MAX_HEAD_BYTES = 64 * 1024
"""Of a request before its body. What the system hands over at once is read to its end: so much more may be held."""
MAX_URL_BYTES = 65535
"""That the parser reads."""
KEEP_ALIVE_S = 75
"""How long a connection may be idle, before its first request too."""


class BoundedHttp(HttpToolsProtocol):
    """One connection. `bounded_http` makes the class that a server uses."""

    metrics: ClassVar[Metrics]
    head_timeout_s: ClassVar[float]
    idle_timeout_s: ClassVar[float]

    url = b""
    """Of the request that is being read; uvicorn sets it when one begins."""
    _head_bytes = 0
    """Of a head that has begun and not ended, without what came with the message before it."""
    _in_head = False
    _message_ended = False
    """Whether one has in what `data_received` was given last."""
    _head_timer: asyncio.TimerHandle | None = None
    _unread: list[memoryview]
    """What the parser is to read next, the last of them first, while `data_received` runs."""
    _being_read: memoryview

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._departure = Departure()
        # uvicorn's timer for idle connections, which it starts after an answer only.
        self.timeout_keep_alive_task = self.loop.call_later(self.idle_timeout_s, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        self._end_of_head()
        super().connection_lost(exc)
        self._departure.happen()

    def data_received(self, data: bytes) -> None:
        self._message_ended = False
        self._unread = [memoryview(data)]
        while self._unread and not self.transport.is_closing():
            self._being_read = self._unread.pop()
            super().data_received(self._being_read)  # type: ignore[arg-type]  # it only hands it to the parser
        del self._being_read
        if self._message_ended or not self._in_head:
            self._end_of_head()
        else:
            self._head_bytes += len(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "headers_too_large")
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._refuse, 408, "head_too_slow")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()
        vars(self)["scope"][DEPARTURE] = self._departure

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._message_ended = True
        vars(self)["scope"][WHOLE] = True
        super().on_message_complete()
        if not self.pipeline:  # a large body has paused it, and a client that leaves is seen by reading only
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a message that it cannot read."""
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(414, "url_too_long")
        else:
            self._refuse(400, "malformed_http")

    def _should_upgrade(self) -> bool:
        """Whether uvicorn forgets what the parser has stopped at, and calls `handle_websocket_upgrade`.

        The parser stops behind each head that offers another protocol, whatever body it announces; and behind CONNECT.
        """
        return self.parser.get_method() != b"CONNECT"

    def handle_websocket_upgrade(self) -> None:
        """Have the parser read the same head again without the offer, then what came behind it."""
        stop = sys.exception()
        assert isinstance(stop, HttpParserUpgrade)
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        head = b"\r\n".join([*lines, b"", b""])
        self._unread = [self._being_read[stop.args[0] :], memoryview(head)]

    def _unsupported_upgrade_warning(self) -> None:
        """Anybody may ask for a tunnel, as often as they like: that is no reason for a line in the log."""

    def _end_of_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, reason: str) -> None:
        self._end_of_head()
        if self.transport.is_closing():
            return
        self.metrics.count_refusal(reason, status)
        if self._answers_here():
            text = STATUS_LINE[status][9:]
            length = b"content-length: %d\r\n" % len(text)
            head = STATUS_LINE[status] + b"content-type: text/plain\r\nconnection: close\r\n" + length
            self.transport.write(head + b"\r\n" + text)
        self.transport.close()

    def _answers_here(self) -> bool:
        """Whether what is written now would be read as the answer to what came last."""
        cycle: RequestResponseCycle | None = vars(self)["cycle"]
        if cycle is None or cycle.response_complete:
            return True
        return not (self._in_head or self.pipeline or cycle.response_started)


def bounded_http(metrics: Metrics, *, head_timeout_s: float, idle_timeout_s: float) -> type[BoundedHttp]:
    """The protocol of a server that counts in `metrics`. A head that has begun has `head_timeout_s` to end."""

    class Bounded(BoundedHttp):
        pass

    Bounded.metrics = metrics
    Bounded.head_timeout_s = head_timeout_s
    Bounded.idle_timeout_s = idle_timeout_s
    return Bounded
