"""Whether a client has left before its answer: nobody computes for the sake of a closed connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import Scope

DEPARTURE = "clarifier.departure"
"""In the ASGI scope, where the server tells."""

Callback = Callable[[], None]


class Departure:
    """Of the client of one connection. The server says when it happens; the event loop's thread alone uses it."""

    def __init__(self) -> None:
        self._happened = False
        self._callbacks = list[Callback]()

    def happen(self) -> None:
        """Call whoever wants to know."""
        self._happened = True
        for callback in [*self._callbacks]:
            callback()

    def tell(self, callback: Callback) -> None:
        """Call `callback` when it happens, now if it has."""
        self._callbacks.append(callback)
        if self._happened:
            callback()

    def forget(self, callback: Callback) -> None:
        """`callback`, which was to be called, is not."""
        self._callbacks.remove(callback)


class WhenGone:
    """Inside its `with` block, `callback` is called when the client of `request` leaves. Its body has been read.

    A server that says nothing of departures is asked for messages, by a task of its own for each request.
    """

    def __init__(self, request: Request, callback: Callback) -> None:
        self._callback = callback
        self._request = request
        self._departure = departure_of(request.scope)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        if self._departure is None:
            self._task = asyncio.ensure_future(self._watch())
        else:
            self._departure.tell(self._callback)

    def __exit__(self, *_: object) -> None:
        if self._departure is not None:
            self._departure.forget(self._callback)
        elif self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            continue
        self._callback()


def departure_of(scope: Scope) -> Departure | None:
    """That of the client of an ASGI scope; None where the server does not tell."""
    departure = scope.get(DEPARTURE)
    assert departure is None or isinstance(departure, Departure)
    return departure
