"""Who has left is known at once, whether the server tells or has to be asked."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import Message, Scope

from service.departure import DEPARTURE, Departure, WhenGone


def request(departure: Departure | None = None, messages: asyncio.Queue[Message] | None = None) -> Request:
    scope: Scope = {"type": "http", "headers": []}
    if departure is not None:
        scope[DEPARTURE] = departure

    async def receive() -> Message:
        assert messages is not None, "a server that tells is not asked"
        return await messages.get()

    return Request(scope, receive)


def test_whoever_is_told_is_told_once_and_nobody_after_the_end() -> None:
    departure, told = Departure(), list[str]()
    with WhenGone(request(departure), lambda: told.append("early")):
        pass
    with WhenGone(request(departure), lambda: told.append("there")):
        departure.happen()
        assert told == ["there"]
    with WhenGone(request(departure), lambda: told.append("late")):
        assert told == ["there", "late"], "it has happened already"
    assert told == ["there", "late"]


def test_a_server_that_does_not_tell_is_asked() -> None:
    async def scenario() -> None:
        messages, told = asyncio.Queue[Message](), list[str]()
        with WhenGone(request(messages=messages), lambda: told.append("there")):
            messages.put_nowait({"type": "http.request"})
            await asyncio.sleep(0.01)
            assert told == []
            messages.put_nowait({"type": "http.disconnect"})
            await asyncio.sleep(0.01)
            assert told == ["there"]
        with WhenGone(request(messages=messages), lambda: told.append("early")):
            await asyncio.sleep(0.01)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0.01)
        assert told == ["there"]

    asyncio.run(scenario())
