"""What is asked of a real Redis twice is done once; and a Redis in trouble stops nobody for good (rows 69 and 70)."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from service.remote.queue import RemoteQueue
from service.remote.store import PARKED, UNREACHABLE, Added, Request, Store
from tests.service import own_redis
from tests.service.conftest import Server, until
from tests.service.fakes import marked, png
from tests.service.farm import GOOD, STREAM, Farm, classify, ready
from tests.service.own_proxy import Proxy
from tests.service.own_redis import SLOW_VALUE, EchoBundle, OwnRedis
from tests.service.redis_faults import FAULTS, Fault

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)
SLOW = png(marked(SLOW_VALUE))
DIGEST = EchoBundle().digest
FEW_CONNECTIONS = 24
"""Of a gateway and a worker, some of which they have just given up."""


# --- adding


@pytest.fixture
def redis() -> Iterator[OwnRedis]:
    server = OwnRedis()
    server.start()
    yield server
    server.kill()


def with_store(url: str, scenario: Callable[[Store], Awaitable[None]]) -> None:
    async def run() -> None:
        store = Store(url)
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(run())


def request(name: str, count: int = 1, *, wanted: bool = True) -> Request:
    return Request(name, DIGEST, [{b"head": b"%d" % number} for number in range(count)], wanted)


def test_a_hand_over_that_is_asked_for_twice_is_done_once(redis: OwnRedis) -> None:
    async def scenario(store: Store) -> None:
        first = await store.add("g", 0, [request("a", 2), request("b")], 10)
        assert [(added.length, len(added.entries or [])) for added in first] == [(2, 2), (3, 1)]
        assert await store.add("g", 0, [request("a", 2), request("b"), request("c")], 10) == [
            *first,
            Added(4, [_last(redis)]),
        ]
        assert _added(redis) == 4
        await store.add("g", 1, [request("a", 2)], 10)  # another one
        await store.add("h", 1, [request("a", 2)], 10)  # of another gateway
        assert _added(redis) == 8

    with_store(redis.url, scenario)


def test_what_had_no_room_is_tried_again_and_what_nobody_wants_is_not_added(redis: OwnRedis) -> None:
    async def scenario(store: Store) -> None:
        assert await store.add("g", 0, [request("a", 3)], 2) == [Added(0, None)]
        (added,) = await store.add("g", 0, [request("a", 3)], 3)
        assert (added.length, _added(redis)) == (3, 3)
        gone = [request("a", 3, wanted=False), request("b", wanted=False)]
        assert await store.add("g", 0, gone, 10) == [added, Added(3, None)]
        assert _added(redis) == 3
        await store.forget_gateway("g")
        assert redis.client().keys("*") == [STREAM.encode()]

    with_store(redis.url, scenario)


def test_row_70_an_answer_that_comes_too_late_is_asked_for_again(redis: OwnRedis) -> None:
    with Proxy(redis.port).running() as proxy:

        async def scenario(store: Store) -> None:
            await store.run_id()  # it is connected
            proxy.delay_s = 5.0
            with pytest.raises(UNREACHABLE):
                await store.add("g", 0, [request("a", 2)], 10)
            proxy.delay_s = 0.0
            (added,) = await store.add("g", 0, [request("a", 2)], 10)
            assert (added.length, len(added.entries or []), _added(redis)) == (2, 2, 2)

        with_store(proxy.url, scenario)


def test_row_70_without_memory_nothing_is_added(redis: OwnRedis) -> None:
    async def scenario(store: Store) -> None:
        await store.add("g", 0, [request("a")], 10)
        redis.client().config_set("maxmemory", 1)
        with pytest.raises(UNREACHABLE):
            await store.add("g", 1, [request("b")], 10)
        assert _added(redis) == 1
        redis.client().config_set("maxmemory", 0)
        await store.add("g", 1, [request("b")], 10)
        assert _added(redis) == 2

    with_store(redis.url, scenario)


def _last(redis: OwnRedis) -> str:
    return str(redis.client().xinfo_stream(STREAM)["last-generated-id"].decode())


def _added(redis: OwnRedis) -> int:
    """How many entries there have been."""
    return int(redis.client().xinfo_stream(STREAM)["entries-added"])


# --- gateways and workers


@pytest.fixture(scope="module")
def behind() -> Iterator[tuple[Farm, Server, Proxy]]:
    """A gateway and a worker that reach their Redis through a proxy, shared by the module."""
    with ExitStack() as stack:
        farm = Farm(stack)
        proxy = stack.enter_context(Proxy(farm.redis.port).running())
        farm.url = proxy.url
        server = farm.gateway()
        farm.worker(max_batch_size=1)
        until(lambda: server.client.get("/readyz").status_code == 200, 60)
        yield farm, server, proxy


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_rows_69_and_70_while_redis_is_in_trouble_it_is_503_and_then_all_is_as_it_was(
    behind: tuple[Farm, Server, Proxy], fault: Fault
) -> None:
    farm, server, proxy = behind
    ready(server)
    threads = threading.active_count()
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(classify, server, SLOW)
        until(lambda: farm.taken() == 1)
        fault.begin(farm.redis, proxy)
        try:
            until(lambda: server.client.get("/readyz").status_code == 503)
            for _ in range(20):
                refused = classify(server)
                assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
                assert int(refused.headers["retry-after"]) >= 1
            assert server.client.get("/livez").status_code == 200
            assert server.metric("clarifier_redis_up") == 0
            assert proxy.open <= FEW_CONNECTIONS
            assert threading.active_count() <= threads + 1
        finally:
            fault.end(farm.redis, proxy)
        assert accepted.result().status_code == 200
    ready(server)
    until(lambda: classify(server).status_code == 200)
    until(lambda: server.metric("clarifier_redis_up") == 1)
    until(lambda: farm.waiting() == 0 and server.metric("clarifier_queue_depth") == 0)
    assert farm.redis.client().xlen(PARKED) == 0


def test_row_70_a_request_that_redis_may_have_heard_of_runs_once(
    behind: tuple[Farm, Server, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    farm, server, _ = behind
    ready(server)
    before, deaf = _added(farm.redis), _Deaf(server, monkeypatch)
    deaf.failures = 2
    assert classify(server).status_code == 200
    until(lambda: deaf.failures == 0 and farm.waiting() == 0)
    assert _added(farm.redis) == before + 1


def test_row_70_who_left_while_redis_had_not_answered_leaves_no_entry(
    behind: tuple[Farm, Server, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    farm, server, _ = behind
    ready(server)
    before, deaf = _added(farm.redis), _Deaf(server, monkeypatch)
    farm.workers[0].send_signal(signal.SIGSTOP)  # so that nobody takes it
    try:
        deaf.failures = 10_000
        assert classify(server, GOOD, **{"X-Request-Timeout-Ms": "1000"}).status_code == 504
        deaf.failures = 0
        until(lambda: farm.waiting() == 0 and _added(farm.redis) == before + 1)
    finally:
        farm.workers[0].send_signal(signal.SIGCONT)
    until(lambda: classify(server).status_code == 200)
    until(lambda: server.metric("clarifier_queue_depth") == 0)


class _Deaf:
    """Redis does what the gateway asks, but the next `failures` answers to `add` are lost on the way."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 0
        queue = server.gateway.batcher
        assert isinstance(queue, RemoteQueue)
        self._add = queue._store.add
        monkeypatch.setattr(queue._store, "add", self.add)

    async def add(self, *arguments: object) -> list[Added]:
        added = await self._add(*arguments)  # type: ignore[arg-type]
        if self.failures:
            self.failures -= 1
            raise TimeoutError
        return added


def test_row_70_what_redis_has_evicted_is_sent_again(behind: tuple[Farm, Server, Proxy]) -> None:
    farm, server, _ = behind
    ready(server)
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(classify, server, SLOW) for _ in range(3)]
        until(lambda: farm.waiting() == 3)
        farm.redis.client().delete(STREAM)  # as `allkeys-lru` would
        assert [answer.result().status_code for answer in answers] == [200] * 3
    until(lambda: farm.waiting() == 0)


def test_row_70_a_replica_takes_over_with_what_it_has(behind: tuple[Farm, Server, Proxy]) -> None:
    farm, server, proxy = behind
    ready(server)
    replica = OwnRedis()
    replica.start()
    first, proxy_target = farm.redis, proxy.target
    try:
        replica.client().replicaof("127.0.0.1", str(first.port))
        until(lambda: replica.client().info("replication")["master_link_status"] == "up")
        with ThreadPoolExecutor(1) as clients:
            accepted = clients.submit(classify, server, SLOW)
            until(lambda: farm.taken() == 1)
            assert first.client().wait(1, 5000) == 1
            before = _added(replica)
            first.kill()
            replica.client().replicaof("NO", "ONE")
            proxy.target = replica.port
            assert accepted.result().status_code == 200
        ready(server)
        assert _added(replica) == before  # it was there, and was not sent again
        until(lambda: classify(server).status_code == 200)
    finally:
        replica.kill()
        with suppress(AssertionError):
            first.start()
        proxy.target = proxy_target
        proxy.cut()
