"""Around every request: its id, its metrics, its log line, and the end of connections that cannot go on."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import Access
from service.books import Books
from service.connections import MAX_HEAD_BYTES
from service.entropy import Entropy
from service.errors import ClarifierError, HeadersTooLarge, TooBusy
from service.metrics import Metrics
from service.problems import answer_of
from service.record import Record, new_record
from service.request_headers import headers_of
from service.tracing import Tracing, trace_id_of

MAX_ACTIVE_REQUESTS = 2048
"""That are being answered; idle connections are not counted."""
MAX_HEADERS = 256
"""Of one request; browsers behind proxies send some thirty."""
PROBES = frozenset(
    {"/livez", "/readyz", "/metrics", "/ping", "/healthz", "/health", "/v2/health/live", "/v2/health/ready"}
)
"""Answered however many requests there are: a busy process is not to be restarted for it."""


class RequestMiddleware:
    """Pure ASGI, so that every answer passes here, those of the framework too."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        entropy: Entropy,
        tracing: Tracing | None = None,
        max_active: int = MAX_ACTIVE_REQUESTS,
    ) -> None:
        self.app = app
        self._books = Books(metrics, tracing)
        self._tracing = tracing
        self._entropy = entropy
        self._max_active = max_active
        self._active = dict[int, Scope]()
        metrics.watch_requests(lambda: [_route_of(scope) for scope in list(self._active.values())])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = headers_of(scope)
        record = scope["clarifier.record"] = new_record(headers.get("x-request-id", ""), self._entropy)
        self._trace(record, headers.get("traceparent", ""), scope["path"])
        unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

        async def watched_receive() -> Message:
            nonlocal unread
            message = await receive()
            record.received += len(message.get("body", b""))
            unread = unread and bool(message.get("more_body"))
            return message

        def completed_send(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], *_own_headers(record)]
                if unread:  # what the client goes on sending would be taken for its next request
                    MutableHeaders(scope=message)["Connection"] = "close"
            return send(message)

        app: ASGIApp = self.app
        if _too_large(scope["headers"]):
            app = answer_of(HeadersTooLarge(), scope)
        elif len(self._active) >= self._max_active and scope["path"] not in PROBES:
            app = answer_of(TooBusy(), scope)
        self._active[id(scope)] = scope
        try:
            await app(scope, watched_receive, completed_send)
        finally:
            del self._active[id(scope)]
            if record.status == 500 and not record.code:
                record.code = "internal_server_error"
            record.route = _route_of(scope)
            self._books.enter(record)

    def _trace(self, record: Record, header: str, path: str) -> None:
        """Probes are in no trace of ours."""
        if self._tracing is not None and path not in PROBES:
            self._tracing.begin(record, header)
        elif header:
            record.trace_id = trace_id_of(header)


def _route_of(scope: Scope) -> str:
    """Its pattern; `other` for what matches none, or none yet."""
    return getattr(scope.get("route"), "path", "other")


def _too_large(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES


def _own_headers(record: Record) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-request-id", record.request_id.encode())]
    if record.timing_ms:
        timing = ", ".join([f"{stage};dur={spent:.2f}" for stage, spent in record.timing_ms.items()])
        headers.append((b"server-timing", timing.encode()))
    return headers


class DirectMiddleware:
    """Answers the requests of `routes` by itself, and hands every other one to the framework.

    Between a request and its handler the framework matches, includes, validates and catches. That takes time which a
    small image feels, and these handlers use none of it: they take the request and return the response. Keys are looked
    at, and our own errors answered here; whatever else a handler raises is an internal error.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], access: Access | None) -> None:
        self.app = app
        self._access = access
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, Route)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        try:
            if self._access is not None:
                await self._access.admit(scope)
            response = await route.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        except ClarifierError as error:  # a response raises one only before it has begun
            await answer_of(error, scope)(scope, receive, send)
