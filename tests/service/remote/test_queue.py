"""A gateway in front of a real Redis: everybody it lets in is answered once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from service.remote.store import ANSWERS, WORKER, WORKERS
from tests.service import own_redis
from tests.service.conftest import Server, until
from tests.service.fakes import green, marked, png
from tests.service.farm import GOOD, Farm, at_once, classify, ready
from tests.service.own_redis import SLOW_VALUE, EchoBundle

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)


def test_every_route_is_answered_by_a_worker(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    answer = classify(server, query="?explain=true&defense=atop&seed=7").json()
    assert (answer["label"], answer["model"], answer["defense"]) == ("green", "colors@1", "atop")
    assert answer["digest"] == EchoBundle().digest
    assert (answer["aid_score"], answer["undefended"]["label"], answer["seed"]) == (0.5, "green", 7)
    assert answer["timing_ms"]["queue"] > 0
    assert server.client.post("/detect", content=GOOD).json()["aid_score"] == round(green().mean() / 255, 3)
    purified = server.client.post("/purify", content=GOOD, headers={"Accept": "application/x-npy"})
    assert purified.status_code == 200
    assert [model["name"] for model in server.client.get("/models").json()["models"]] == ["colors"]
    forms = [("images", ("a.png", GOOD)), ("images", ("b.png", b"no image")), ("images", ("c.png", GOOD))]
    results = server.client.post("/classify/batch", files=forms).json()["results"]
    assert [result.get("label", result.get("status")) for result in results] == ["green", 415, "green"]
    until(lambda: farm.waiting() == 0)
    assert farm.redis.client().exists(ANSWERS + "x") == 0


def test_it_is_ready_while_a_worker_is_there(farm: Farm) -> None:
    server = farm.gateway()
    until(lambda: server.client.get("/readyz").json().get("reason") == "no worker is there")
    refused = classify(server)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    assert int(refused.headers["retry-after"]) >= 1
    assert server.client.get("/livez").status_code == 200
    worker = farm.worker()
    ready(server)
    assert classify(server).status_code == 200
    worker.kill()
    until(lambda: server.client.get("/readyz").status_code == 503)


def test_row_69_without_redis_it_says_so_and_goes_on_when_it_is_back(farm: Farm) -> None:
    server = farm.gateway()
    farm.worker()
    ready(server)
    farm.redis.kill()
    until(lambda: server.client.get("/readyz").status_code == 503)
    assert classify(server).status_code == 503
    assert server.client.get("/livez").status_code == 200
    assert server.metric("clarifier_redis_up") == 0
    farm.redis.start()
    ready(server)
    assert classify(server).status_code == 200
    assert server.metric("clarifier_redis_up") == 1
    assert sum(server.metric("clarifier_redis_errors_total", op=op) for op in ("watch", "send", "receive")) > 0


def test_what_a_redis_has_forgotten_is_sent_again(farm: Farm) -> None:
    server = farm.gateway()
    farm.worker(delay_s=1.0, max_batch_size=1)
    ready(server)
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(classify, server) for _ in range(4)]
        until(lambda: farm.waiting() == 4)
        farm.redis.kill()  # it keeps nothing
        time.sleep(0.5)
        farm.redis.start()
        assert [answer.result().status_code for answer in answers] == [200] * 4
    until(lambda: farm.waiting() == 0)


def test_who_would_wait_in_vain_is_refused_at_once(farm: Farm) -> None:
    server = farm.gateway(max_batch_size=1, max_queue_wait_ms=0)
    farm.worker(delay_s=1.0, max_batch_size=1)
    ready(server)
    hurried = {"x-request-timeout-ms": "2500"}
    assert server.client.post("/classify", content=GOOD, headers=hurried).status_code == 200
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(classify, server) for _ in range(8)]
        until(lambda: farm.waiting() >= 7)
        refused = server.client.post("/classify", content=GOOD, headers=hurried)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert [answer.result().status_code for answer in answers] == [200] * 8
    assert not server.gateway.batcher._waiting  # type: ignore[union-attr]


def test_who_would_wait_longer_than_anybody_should_is_refused_but_not_from_the_next_batch(farm: Farm) -> None:
    server = farm.gateway(max_batch_size=2, max_queue_wait_ms=500)
    farm.worker(delay_s=1.0, max_batch_size=2)
    ready(server)
    assert classify(server).status_code == 200
    with ThreadPoolExecutor(32) as clients:
        statuses = Counter(answer.status_code for answer in clients.map(classify, [server] * 32))
    assert statuses[200] >= 4, "a batch that runs, and the next one"
    assert statuses[429] == 32 - statuses[200] > 0


def test_who_leaves_and_who_is_too_late_never_reach_the_engine(farm: Farm) -> None:
    server = farm.gateway()
    farm.worker(max_batch_size=1)
    ready(server)
    with ThreadPoolExecutor(2) as clients:
        held = clients.submit(classify, server, png(marked(SLOW_VALUE)), "", **{"X-Request-Timeout-Ms": "2000"})
        until(lambda: farm.taken() == 1)
        late = classify(server, png(marked(SLOW_VALUE)), "", **{"X-Request-Timeout-Ms": "300"})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/classify", content=png(marked(SLOW_VALUE)), timeout=0.3)
        until(lambda: farm.waiting() == 1)  # what runs
        assert held.result().status_code == 504
    until(lambda: farm.waiting() == 0)
    started = time.monotonic()
    assert classify(server).status_code == 200  # behind the slow one alone
    assert time.monotonic() - started < 5
    assert server.metric("clarifier_rejected_total", reason="client_left") == 1


def test_a_full_queue_is_answered_429(farm: Farm) -> None:
    server = farm.gateway(max_queue_size=4, max_batch_size=1)
    farm.worker(delay_s=0.5, max_batch_size=1)
    ready(server)
    statuses = [response.status_code for response in at_once(server, 12)]
    assert set(statuses) == {200, 429}
    until(lambda: farm.waiting() == 0)
    until(lambda: server.metric("clarifier_queue_depth") == 0)


def test_a_gateway_needs_no_torch_and_little_memory(farm: Farm) -> None:
    port = own_redis.free_port()
    given = {"QUEUE": "redis", "REDIS_URL": farm.redis.url, "PORT": str(port), "DEFAULT_MODEL": "colors"}
    tells = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    root = Path(__file__).parents[3]
    line = [sys.executable, "-c", f"{tells}; from service.__main__ import main; main()"]
    environment = {**os.environ, **{f"CLARIFIER_{name}": value for name, value in given.items()}}
    process = subprocess.Popen(line, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    farm.worker()
    try:
        until(lambda: _status(port) == 200)
        resident = psutil.Process(process.pid).memory_info().rss
    finally:
        process.terminate()
        printed, _ = process.communicate(timeout=20)
    assert printed.splitlines()[-1] == "False"
    assert resident < 250e6


def _status(port: int) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("forged", ["[", "{}", '{"bundles": {"colors@1": 3}, "device": "cpu", "engine": "x"}'])
def test_row_72_a_forged_worker_is_left_out(forged: str, shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    farm.redis.client().set(WORKER + "forged", forged, px=2000)
    farm.redis.client().sadd(WORKERS, "forged")
    time.sleep(1.2)  # two looks
    assert server.client.get("/readyz").status_code == 200
    assert classify(server).status_code == 200
