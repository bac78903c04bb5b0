"""What is known of an image when it has been answered, and how one is run again beside the requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from service.errors import UnknownModel
from service.queue import Outcome
from service.work import Key, Pixels

if TYPE_CHECKING:  # which has what runs cases again
    from service.gateway import Gateway

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Case:
    """An image that was answered."""

    key: Key
    """What it was asked."""
    image: Pixels
    seed: int
    request_id: str
    client: str
    """The name of the key that asked; empty where there are none."""


async def run_again(gateway: Gateway, key: Key, cases: Sequence[Case]) -> list[Outcome]:
    """What becomes of the images of `cases`, asked `key` with their seeds, in at most half of the queue.

    To be run in a task of its own: a reload waits for those who are inside now until their task ends. Raises what a
    request would be refused with.
    """
    visit = gateway.let_in()
    try:
        queue, settings = visit.batcher, gateway.settings
        if gateway.catalog.digests.get(key.model) != key.digest:
            raise UnknownModel("it is not served any more")
        with queue.places() as places:
            queue.check_open(settings.max_queue_size // 2)
            queue.reserve(places, len(cases))
            deadline = time.monotonic() + settings.request_timeout_ms / 1000
            images, seeds = [case.image for case in cases], [case.seed for case in cases]
            items = queue.admit(places, key, images, seeds, deadline)
        return await queue.wait(items)
    finally:
        visit.end()


async def run_in_batches(
    ones: Sequence[T], key_of: Callable[[T], K], most: int, run: Callable[[K, Sequence[T]], Coroutine[None, None, None]]
) -> None:
    """`run` those of `ones` that have the same key together, at most `most` at once, one batch after the other, each in
    a task of its own, as `run_again` wants it.
    """
    for key in dict.fromkeys(map(key_of, ones)):
        alike = [one for one in ones if key_of(one) == key]
        for start in range(0, len(alike), most):
            await asyncio.create_task(run(key, alike[start : start + most]))
