"""Gateways find near-duplicates together, as one would alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest

from service.metrics import Metrics
from service.remote.families import SharedFamilies
from service.remote.shared import Shared
from service.remote.store import FAMILIES, FAMILIES_BEFORE, FAMILIES_SALT
from service.watch.families import MemoryFamilies
from service.watch.fingerprints import Fingerprint, Fingerprints
from tests.service.conftest import until
from tests.service.fakes import png
from tests.service.farm import Farm, classify, ready
from tests.service.watch.test_similarity import now, scene, square_attack

R = TypeVar("R")


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with ExitStack() as stack:
        yield Farm(stack)


@pytest.fixture(autouse=True)
def empty(farm: Farm) -> None:
    farm.redis.client().flushall()


def fingerprints(salt: int) -> list[Fingerprint]:
    """An attack, other images between its queries, and some of them twice."""
    taker = Fingerprints(salt)
    taken = list[Fingerprint]()
    for number, query in enumerate(square_attack(scene(1), 60)):
        taken += [taker.take("one", query)] * (1 + (number % 7 == 0))
        taken += [taker.take("one", scene(100 + number)), taker.take("another", query)]
    return taken


def beside(farm: Farm, play: Callable[[Shared], Awaitable[R]]) -> R:
    async def run() -> R:
        shared = Shared(farm.url, Metrics(), tells=False)
        shared.start()
        await asyncio.sleep(0.2)
        try:
            return await play(shared)
        finally:
            await shared.stop()

    return asyncio.run(run())


def test_redis_counts_as_memory_does(farm: Farm) -> None:
    async def play(shared: Shared) -> list[int]:
        one, another = SharedFamilies(shared), SharedFamilies(shared)
        salt = await one.salt()
        assert salt == await another.salt()
        found = list[int]()
        for number, each in enumerate(fingerprints(salt)):
            found += await (one if number % 2 else another).note([each])
        return found

    found = beside(farm, play)
    salt = int(farm.redis.client().get(FAMILIES_SALT) or b"")
    assert found == now(MemoryFamilies().note(fingerprints(salt)))
    assert max(found) > 40


def test_what_is_kept_is_bounded(farm: Farm) -> None:
    async def play(shared: Shared) -> None:
        families = SharedFamilies(shared, capacity=500)
        taker = Fingerprints(await families.salt())
        for start in range(0, 200, 50):
            await families.note([taker.take("one", scene(seed)) for seed in range(start, start + 50)])

    beside(farm, play)
    client = farm.redis.client()
    sizes = [client.hlen(FAMILIES), client.hlen(FAMILIES_BEFORE)]
    assert all(0 < size <= 551 for size in sizes)
    assert all(0 < client.ttl(key) <= 3600 for key in (FAMILIES, FAMILIES_BEFORE))


@pytest.mark.parametrize("damage", ["not a number", "wrong type", "strange record"])
def test_what_others_have_put_there_stops_nothing(farm: Farm, damage: str) -> None:
    client = farm.redis.client()

    async def play(shared: Shared) -> list[int]:
        families = SharedFamilies(shared)
        if damage == "not a number":
            client.set(FAMILIES_SALT, "none")
        elif damage == "wrong type":
            client.set(FAMILIES, "a string")
        taker = Fingerprints(await families.salt())
        queries = [taker.take("one", query) for query in square_attack(scene(1), 3)]
        first = await families.note(queries[:1])
        if damage == "strange record":
            names: list[Any] = client.hkeys(FAMILIES)
            records = [name for name in names if name.startswith(b"family")]
            assert len(records) == 1
            client.hset(FAMILIES, records[0], "strange")
        return first + await families.note(queries[1:])

    found = beside(farm, play)
    assert found == ([0, 0, 0] if damage == "wrong type" else [0, 1, 2])


def test_without_redis_each_finds_its_own(farm: Farm) -> None:
    async def play() -> list[int]:
        shared = Shared("redis://127.0.0.1:1/0", Metrics(), tells=False)
        families = SharedFamilies(shared)
        taker = Fingerprints(await families.salt())
        return await families.note([taker.take("one", query) for query in square_attack(scene(1), 5)])

    assert asyncio.run(play()) == [0, 1, 2, 3, 4]


def test_row_84_an_attack_by_way_of_two_gateways_is_one(farm: Farm) -> None:
    with ExitStack() as stack:
        spread = Farm(stack)
        gateways = [spread.gateway(similarity_limit=10) for _ in range(2)]
        spread.worker()
        for gateway in gateways:
            ready(gateway)
        until(lambda: spread.redis.client().exists("clarifier:probe"))
        for number, query in enumerate(square_attack(scene(1, 8), 40)):
            assert classify(gateways[number % 2], png(query)).status_code == 200

        def count(name: str, **labels: str) -> float:
            return sum(gateway.metric(f"clarifier_{name}_total", **labels) for gateway in gateways)

        until(lambda: count("near_duplicates", key="(none)") >= 20)
        until(lambda: count("query_similarity_alerts") > 10)
