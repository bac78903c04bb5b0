"""Around every request: its id, its metrics, its log line, and the end of connections that cannot go on."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import TooBusy, answer_of
from service.logs import log_request
from service.metrics import Metrics
from service.record import new_record

MAX_ACTIVE_REQUESTS = 2048
"""That are being answered; idle connections are not counted."""
PROBES = frozenset({"/livez", "/readyz", "/metrics", "/ping", "/healthz", "/health"})
"""Answered however many requests there are: a busy process is not to be restarted for it."""


class RequestMiddleware:
    """Pure ASGI, so that every answer passes here, those of the framework too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_active: int = MAX_ACTIVE_REQUESTS) -> None:
        self.app = app
        self.metrics = metrics
        self._max_active = max_active
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = scope["clarifier.record"] = new_record(headers.get("x-request-id", ""))
        unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

        async def watched_receive() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def completed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = record.request_id
                if record.timing_ms:
                    answer["Server-Timing"] = ", ".join(f"{k};dur={v:.2f}" for k, v in record.timing_ms.items())
                if unread:  # what the client goes on sending would be taken for its next request
                    answer["Connection"] = "close"
            await send(message)

        app: ASGIApp = self.app
        if self._active >= self._max_active and scope["path"] not in PROBES:
            app = answer_of(TooBusy(), record)
        self._active += 1
        try:
            await app(scope, watched_receive, completed_send)
        finally:
            self._active -= 1
            if record.status == 500 and not record.code:
                record.code = "internal_server_error"
            record.route = getattr(scope.get("route"), "path", "other")
            self.metrics.count_request(record)
            log_request(record)
