"""What is left for a loop is bounded, and taken in order."""

from __future__ import annotations

import asyncio

from service.watch.inbox import Inbox


def test_what_was_put_is_taken_at_once_and_in_order() -> None:
    async def play() -> None:
        inbox = Inbox[str]()
        taking = asyncio.create_task(inbox.take(gather_s=0.01))
        await asyncio.sleep(0)
        assert not taking.done()
        assert inbox.put("a", 1)
        assert inbox.put("b", 1)
        assert await taking == ["a", "b"]

    asyncio.run(play())


def test_what_there_is_no_room_for_is_left_out_until_there_is() -> None:
    async def play() -> None:
        inbox = Inbox[str](max_bytes=10)
        assert [inbox.put(name, 5) for name in "abc"] == [True, True, False]
        assert await inbox.take() == ["a", "b"]
        assert inbox.put("d", 10)
        assert await inbox.take() == ["d"]

    asyncio.run(play())
