"""What gateways share in a real Redis, and that no request needs it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from redis.asyncio import Redis

import service.remote.shared
from service.loading import load_engine
from service.metrics import Metrics
from service.remote.shared import ENTRY_BYTES, MAX_CONNECTIONS, MAX_ENTRY_BYTES, Shared, SharedCache, SharedWindows
from service.remote.store import CACHE, RATE
from service.remote.wire import pack_answer
from service.work import Answer, Classified, Detected, Purified
from tests.service import own_redis
from tests.service.conftest import Running, Server, running, serving, until
from tests.service.fakes import FakeBundle, batch, green, png
from tests.service.own_proxy import Proxy
from tests.service.own_redis import OwnRedis
from tests.service.redis_faults import FAULTS, Fault

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)
GOOD = png(green())


class Site:
    """A Redis behind a proxy, and services in front of it that have their engines in them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.redis = OwnRedis()
        self.redis.start()
        stack.callback(self.redis.kill)
        self.proxy = stack.enter_context(Proxy(self.redis.port).running())

    def service(self, **settings: Any) -> Running:
        server = self._stack.enter_context(running(FakeBundle(), **{"redis_url": self.proxy.url, **settings}))
        until(lambda: server.metric("clarifier_redis_up") == 1 or not self.redis.process)
        return server


@pytest.fixture(autouse=True)
def _patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a Redis is well, a machine that is slow must not make it look ill."""
    if "impatient" not in request.fixturenames:
        monkeypatch.setattr(service.remote.shared, "PATIENCE_S", 20.0)
        monkeypatch.setattr(service.remote.shared, "CONNECT_S", 20.0)


@pytest.fixture
def impatient() -> float:
    """As it is outside of tests: how long a request waits."""
    return service.remote.shared.PATIENCE_S


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack)


def classify(server: Server, query: str = "?defense=none") -> httpx.Response:
    return server.client.post(f"/classify{query}", content=GOOD)


def statuses(server: Running, count: int) -> list[int]:
    return [classify(server).status_code for _ in range(count)]


def cached(server: Running, result: str) -> float:
    return server.metric("clarifier_cache_requests_total", result=result)


def errors(server: Running, op: str) -> float:
    return server.metric("clarifier_redis_errors_total", op=op)


def only(keys: Iterable[bytes | str]) -> str:
    """The one key that there is."""
    (key,) = keys
    return key.decode() if isinstance(key, bytes) else key


def answered_from_cache(server: Running) -> bool:
    """Whether an image that was asked for before is known, not to this process alone."""
    before = cached(server, "hit")
    assert [status for status in statuses(server, 2) if status != 200] == []
    return cached(server, "hit") > before


# --- together


def test_two_gateways_count_together(site: Site) -> None:
    first, second = site.service(rate_limit="5/hour"), site.service(rate_limit="5/hour")
    assert statuses(first, 2) == [200] * 2
    assert second.client.post("/classify/batch", files=batch(GOOD, GOOD, GOOD)).status_code == 200
    for server in (first, second):
        refused = classify(server)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert 3000 < int(refused.headers["retry-after"]) < 4500
    key = only(site.redis.client().keys("clarifier:rate*"))
    assert key == f"{RATE}:LIMITER/127.0.0.1/5/1/hour"
    assert 0 < site.redis.client().ttl(key) <= 3600


def test_gateways_without_engines_count_together_too(site: Site) -> None:
    settings = {"default_model": "colors", "queue": "redis", "redis_url": site.redis.url, "rate_limit": "4/hour"}
    with serving(load_engine, settings) as first, serving(load_engine, settings) as second:
        until(lambda: all("worker" in server.client.get("/readyz").text for server in (first, second)))
        refused = [classify(server).status_code for server in (first, second, first, second, first, second)]
    assert refused == [503] * 4 + [429] * 2  # no worker is there


def test_what_one_gateway_was_answered_another_knows(site: Site) -> None:
    first, second = site.service(cache_ttl_s=600.0), site.service(cache_ttl_s=600.0)
    query = "?defense=atop&seed=3&explain=true"
    answers = [classify(server, query).json() for server in (first, second)]
    assert second.bundle.batches == []
    assert (cached(first, "miss"), cached(second, "hit")) == (1, 1)
    for answer in answers:
        del answer["request_id"], answer["timing_ms"]
    assert answers[0] == answers[1]
    purified = [server.client.post("/purify?defense=none", content=GOOD).content for server in (second, first)]
    assert purified[0] == purified[1]
    assert cached(first, "hit") == 1
    for key in (keys := site.redis.client().keys(CACHE + "*")):
        assert 0 < site.redis.client().pttl(key) <= 600_000
    assert len(keys) == 2


def test_a_redis_that_nobody_named_is_not_looked_for(start: Callable[..., Running]) -> None:
    server = start(rate_limit="1/hour", cache_ttl_s=60.0)
    assert statuses(server, 2) == [200, 429]
    assert (server.metric("clarifier_redis_up"), errors(server, "look")) == (0, 0)


# --- without it


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_rows_69_70_and_75_a_redis_in_trouble_has_no_effect_but_on_what_is_shared(site: Site, fault: Fault) -> None:
    server = site.service(cache_ttl_s=600.0, rate_limit="100000/hour")
    until(lambda: answered_from_cache(server))
    threads = threading.active_count()
    fault.begin(site.redis, site.proxy)
    assert statuses(server, 50) == [200] * 50
    until(lambda: server.metric("clarifier_redis_up") == 0)
    assert not answered_from_cache(server)
    assert sum(errors(server, op) for op in ("look", "limit", "find", "keep")) > 0
    assert server.client.get("/readyz").status_code == 200
    assert threading.active_count() <= threads + 1
    assert site.proxy.open <= 2 * MAX_CONNECTIONS
    fault.end(site.redis, site.proxy)
    until(lambda: server.metric("clarifier_redis_up") == 1)
    until(lambda: answered_from_cache(server))


def test_row_70_a_slow_redis_costs_one_short_wait_and_not_one_each(site: Site, impatient: float) -> None:
    assert impatient <= 0.1
    server = site.service(rate_limit="100000/hour")
    site.proxy.delay_s, before = 5.0, errors(server, "limit")
    assert statuses(server, 50) == [200] * 50
    assert errors(server, "limit") <= before + 1
    site.proxy.delay_s = 0.0


def test_row_75_a_name_that_nobody_knows_is_a_redis_that_is_away(site: Site) -> None:
    site.redis.kill()
    server = site.service(redis_url="redis://nowhere.invalid:6379/0", rate_limit="2/hour", cache_ttl_s=60.0)
    assert statuses(server, 3) == [200, 200, 429]
    assert server.metric("clarifier_redis_up") == 0


def test_row_69_while_redis_is_away_each_gateway_counts_alone(site: Site) -> None:
    servers = [site.service(rate_limit="3/hour") for _ in range(2)]
    assert statuses(servers[0], 3) == [200] * 3
    site.redis.kill()
    for server in servers:
        until(lambda: server.metric("clarifier_redis_up") == 0)  # noqa: B023
        assert statuses(server, 4) == [200, 200, 200, 429]
    site.redis.start()
    for server in servers:
        until(lambda: server.metric("clarifier_redis_up") == 1)  # noqa: B023
    assert [classify(server).status_code for server in (*servers, *servers)] == [200, 200, 200, 429]


def test_row_70_answers_that_redis_has_evicted_are_made_again(site: Site) -> None:
    server = site.service(cache_ttl_s=600.0)
    assert answered_from_cache(server)
    for key in site.redis.client().keys(CACHE + "*"):
        site.redis.client().delete(key)
    assert classify(server).status_code == 200
    assert cached(server, "miss") == 2
    assert sum(errors(server, op) for op in ("look", "find", "keep", "malformed")) == 0


def test_what_is_wrong_is_logged_when_it_changes_and_not_while_it_lasts(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [line.message for line in caplog.records if line.name == "service.remote.shared"]

    caplog.set_level("INFO")
    server = site.service(rate_limit="100000/hour")
    site.redis.kill()
    until(lambda: errors(server, "look") >= 3)
    statuses(server, 5)
    site.redis.start()
    until(lambda: errors(server, "look") > 0 and said()[-1].endswith("are shared in Redis"))
    assert len(said()) == 3
    assert "ConnectionError" in said()[1]


# --- what others have written


FORGED: list[Answer] = [
    Detected(0.5),
    Purified(np.zeros((8, 8, 3), np.float32), 0.0),
    Classified(np.full(4, 0.25, np.float32)),
    Classified(np.array([0.5, np.nan, 0.5], np.float32)),
    Classified(np.array([0.5, 7, 0.5], np.float32)),
    Classified(np.ones(3, np.float32), undefended=np.ones(3, np.float32)),
    Classified(np.ones(3, np.float32), ran="<script>"),
    Classified(np.ones(3, np.float32), aid_score=2.0),
]


@pytest.mark.parametrize("forged", [*FORGED, b"x", b'[["head", 5]]\n{}', b"cos\nsystem\n(S'true'\ntR.", 0, 9 * 2**20])
def test_row_72_a_forged_answer_is_left_out_counted_and_replaced(site: Site, forged: Answer | bytes | int) -> None:
    server, client = site.service(cache_ttl_s=600.0), site.redis.client()
    assert classify(server).status_code == 200
    key = only(client.keys(CACHE + "*"))
    name = key.removeprefix(CACHE)
    client.delete(key)
    if isinstance(forged, int):  # so many bytes; none: another type
        client.set(key, bytes(forged)) if forged else client.rpush(key, "x")
    else:
        client.set(key, forged if isinstance(forged, bytes) else pack_answer(name, forged))
    answer = classify(server)
    assert (answer.status_code, answer.json()["label"]) == (200, "green")
    assert (errors(server, "malformed"), cached(server, "miss")) == (1, 2)
    assert classify(server).json()["label"] == "green"
    assert cached(server, "hit") == 1


def test_row_72_an_answer_to_another_question_is_none(site: Site) -> None:
    server, client = site.service(cache_ttl_s=600.0), site.redis.client()
    assert classify(server).status_code == 200
    key = only(client.keys(CACHE + "*"))
    assert classify(server, "?defense=aid").status_code == 200
    other = only(set(client.keys(CACHE + "*")) - {key.encode()})
    client.copy(key, other, replace=True)
    assert classify(server, "?defense=aid").status_code == 200
    assert errors(server, "malformed") == 1


def test_row_72_a_forged_window_is_counted_around(site: Site) -> None:
    server, client = site.service(rate_limit="2/hour"), site.redis.client()
    assert classify(server).status_code == 200
    client.set(only(client.keys(RATE + "*")), "forged")
    assert statuses(server, 3) == [200, 200, 429]  # by this process
    assert errors(server, "limit") >= 3
    assert server.metric("clarifier_redis_up") == 1


# --- its own bounds


def with_shared(site: Site, scenario: Callable[[Shared], Awaitable[None]]) -> None:
    async def run() -> None:
        shared = Shared(site.proxy.url, Metrics(), tells=True)
        shared.start()
        try:
            while not shared._is_up:
                await asyncio.sleep(0.01)
            await scenario(shared)
        finally:
            await shared.stop()

    asyncio.run(run())


@pytest.mark.parametrize("samples", [0, 200, 3072, 150_528])
def test_a_gateways_answers_take_no_more_than_they_may_and_what_it_says_they_take(site: Site, samples: int) -> None:
    now, client = [0.0], site.redis.client()

    async def scenario(shared: Shared) -> None:
        answer = Classified(np.zeros(samples, np.float32))
        limit = 4 * (ENTRY_BYTES + 5 * len(pack_answer("0" * 64, answer)) // 4)
        cache = SharedCache(shared, 60.0, limit, lambda: now[0])
        for number in range(6):
            await cache.keep({bytes([number]) * 32: answer})
        keys = client.keys(CACHE + "*")
        assert len(keys) == 4
        assert sum(int(client.memory_usage(key) or 0) for key in keys) <= cache.held <= limit
        now[0] = 60.0
        await cache.keep({bytes([9]) * 32: answer})
        assert len(client.keys(CACHE + "*")) == 5
        large = Purified(np.zeros((1024, 1024, 3), np.float32), 0.0)
        await SharedCache(shared, 60.0).keep({bytes([8]) * 32: large})
        assert large.image.nbytes > MAX_ENTRY_BYTES
        assert len(client.keys(CACHE + "*")) == 5

    with_shared(site, scenario)


def test_many_at_once_are_all_counted_over_few_connections(site: Site) -> None:
    async def scenario(shared: Shared) -> None:
        windows = SharedWindows(shared)
        for _ in range(3):
            await asyncio.gather(*(windows.acquire_entry("a", 1000, 60) for _ in range(100)))
        assert site.proxy.open <= 2 * MAX_CONNECTIONS  # some of them may just have been given up

    with_shared(site, scenario)


@pytest.mark.usefixtures("impatient")
def test_connections_that_were_given_up_while_they_waited_are_there_again(site: Site) -> None:
    async def scenario(shared: Shared) -> None:
        windows = SharedWindows(shared)
        for _ in range(3):
            site.proxy.held = True
            await asyncio.gather(*(windows.acquire_entry("a", 100_000, 60) for _ in range(5 * MAX_CONNECTIONS)))
            assert not shared._is_up
            site.proxy.held = False
            while not shared._is_up:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            clients = [
                Redis(connection_pool=shared.pool, single_connection_client=True) for _ in range(MAX_CONNECTIONS)
            ]
            for client in clients[1:]:  # one may be looking
                await client.initialize()
        for client in clients:
            await client.aclose()

    with_shared(site, scenario)


# --- secrets


@pytest.mark.parametrize("password", ["right-canary", "wrong-canary"])
def test_row_82_the_password_is_in_no_log_no_answer_and_no_metric(
    site: Site, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    site.redis.client().config_set("requirepass", "right-canary")
    settings = {"rate_limit": "3/hour", "cache_ttl_s": 60.0, "api_keys_file": None}
    url = f"redis://:{password}@127.0.0.1:{site.proxy.port}/0"
    with running(FakeBundle(), **settings, redis_url=url) as server:
        is_right = password == "right-canary"
        until(lambda: server.metric("clarifier_redis_up") == 1 if is_right else errors(server, "look") > 1)
        answers = [classify(server) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        pages = [server.client.get(path) for path in ("/metrics", "/openapi.json", "/readyz", "/models")]
        said = [page.text + json.dumps(dict(page.headers)) for page in (*answers, *pages)]
        said += [repr(server.gateway.settings), server.gateway.settings.model_dump_json(), caplog.text]
    assert caplog.text
    assert "canary" not in " ".join(said)
