"""Gateways and workers that meet in a real Redis: everybody is answered once, whoever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import redis as redis_client

from service.loading import load_engine
from service.remote import RemoteQueue
from service.store import ANSWERS, PARKED, WORK
from tests.service import own_redis
from tests.service.conftest import Server, serving, until
from tests.service.fakes import green, marked, png
from tests.service.own_redis import DEADLY_VALUE, SLOW_VALUE, EchoBundle, OwnRedis, start_worker

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)

GOOD = png(green())
STREAM = WORK + EchoBundle().digest


class Farm:
    """A Redis, gateways in this process, workers in others."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.redis = OwnRedis()
        self.redis.start()
        stack.callback(self.redis.kill)
        self.workers: list[subprocess.Popen[bytes]] = []

    def gateway(self, **settings: Any) -> Server:
        given = {"default_model": "colors", "queue": "redis", "redis_url": self.redis.url, "drain_timeout_s": 5.0}
        return self._stack.enter_context(serving(load_engine, {**given, **settings}))

    def worker(self, **settings: Any) -> subprocess.Popen[bytes]:
        process = start_worker(self.redis.url, **settings)
        self._stack.callback(_end, process)
        self.workers.append(process)
        return process

    def waiting(self) -> int:
        """Entries that wait or run."""
        return int(self.redis.client().xlen(STREAM))

    def taken(self) -> int:
        """Entries that a worker has."""
        with suppress(redis_client.ResponseError):
            return int(self.redis.client().xpending(STREAM, "workers")["pending"])
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def farm() -> Iterator[Farm]:
    with ExitStack() as stack:
        yield Farm(stack)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Farm, Server]]:
    """A gateway and a worker that a module shares."""
    with ExitStack() as stack:
        farm = Farm(stack)
        server = farm.gateway()
        farm.worker()
        ready(server)
        yield farm, server


def ready(server: Server) -> None:
    until(lambda: server.client.get("/readyz").status_code == 200)


def classify(server: Server, image: bytes = GOOD, query: str = "", **headers: str) -> httpx.Response:
    return server.client.post(f"/classify{query}", content=image, headers=headers)


def at_once(server: Server, count: int, image: bytes = GOOD) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as clients:
        return list(clients.map(lambda _: classify(server, image), range(count)))


def test_every_route_is_answered_by_a_worker(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    answer = classify(server, query="?explain=true&defense=atop&seed=7").json()
    assert (answer["label"], answer["model"], answer["defense"]) == ("green", "colors@1", "atop")
    assert answer["digest"] == EchoBundle().digest
    assert (answer["aid_score"], answer["undefended"]["label"], answer["seed"]) == (0.5, "green", 7)
    assert answer["timing_ms"]["queue"] > 0
    assert server.client.post("/detect", content=GOOD).json()["aid_score"] == pytest.approx(green().mean() / 255)
    purified = server.client.post("/purify", content=GOOD, headers={"Accept": "application/x-npy"})
    assert purified.status_code == 200
    assert [model["name"] for model in server.client.get("/models").json()["models"]] == ["colors"]
    forms = [("images", ("a.png", GOOD)), ("images", ("b.png", b"no image")), ("images", ("c.png", GOOD))]
    results = server.client.post("/classify/batch", files=forms).json()["results"]
    assert [result.get("label", result.get("status")) for result in results] == ["green", 415, "green"]
    until(lambda: farm.waiting() == 0)
    assert farm.redis.client().exists(ANSWERS + "x") == 0


def test_images_that_wait_together_run_together(farm: Farm) -> None:
    server = farm.gateway(max_batch_size=8)
    farm.worker(delay_s=0.3, max_batch_size=8)
    ready(server)
    classify(server)
    started = time.monotonic()
    assert {response.status_code for response in at_once(server, 16)} == {200}
    assert time.monotonic() - started < 16 * 0.3 / 2  # one by one it is 4.8 s


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


def test_row_71_what_a_dead_worker_had_another_runs(farm: Farm) -> None:
    server = farm.gateway()
    first = farm.worker(delay_s=60.0)
    ready(server)
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(classify, server) for _ in range(3)]
        until(lambda: farm.taken() >= 1)
        farm.worker()
        first.kill()
        assert [answer.result().json()["label"] for answer in answers] == ["green"] * 3
    until(lambda: farm.waiting() == 0)


def test_an_entry_that_kills_its_workers_is_parked_and_its_neighbors_are_answered(farm: Farm) -> None:
    server = farm.gateway(request_timeout_ms=60_000)
    first = farm.worker(delay_s=0.5)
    ready(server)
    stopping = threading.Event()
    keeper = threading.Thread(target=_keep_two, args=(farm, stopping))
    with ThreadPoolExecutor(4) as clients:
        busy = clients.submit(classify, server)
        until(lambda: farm.taken() == 1)
        guilty = clients.submit(classify, server, png(marked(DEADLY_VALUE)))
        neighbors = [clients.submit(classify, server) for _ in range(2)]
        keeper.start()
        try:
            assert busy.result().status_code == 200
            refused = guilty.result(timeout=60)
            assert (refused.status_code, refused.json()["code"]) == (500, "inference_failed")
            assert [neighbor.result().status_code for neighbor in neighbors] == [200, 200]
        finally:
            stopping.set()
            keeper.join()
    assert first.poll() == -9
    assert farm.redis.client().xlen(PARKED) == 1
    until(lambda: farm.waiting() == 0)


def _keep_two(farm: Farm, stopping: threading.Event) -> None:
    """Start workers anew as they die, as an orchestrator does."""
    while not stopping.is_set():
        if sum(worker.poll() is None for worker in farm.workers) < 2:
            farm.worker()
        time.sleep(0.05)


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


@pytest.mark.parametrize("fields", [{"head": "{}"}, {"anything": "else"}])
def test_row_72_a_forged_entry_is_left_out_and_the_next_one_answered(
    fields: dict[Any, Any], shared: tuple[Farm, Server]
) -> None:
    farm, server = shared
    farm.redis.client().xadd(STREAM, fields)
    queue = server.gateway.batcher
    assert isinstance(queue, RemoteQueue)
    farm.redis.client().xadd(ANSWERS + queue.name, fields)
    assert classify(server).status_code == 200
    until(lambda: farm.waiting() == 0)
    assert server.metric("clarifier_redis_errors_total", op="malformed") >= 1


def test_a_worker_that_is_told_to_end_answers_what_it_has(farm: Farm) -> None:
    server = farm.gateway()
    first = farm.worker(delay_s=0.2, max_batch_size=2)
    ready(server)
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(classify, server) for _ in range(8)]
        until(lambda: farm.taken() >= 1)
        farm.worker(max_batch_size=2)
        first.terminate()
        assert {answer.result().status_code for answer in answers} == {200}
    assert first.wait(20) == 0


def test_two_gateways_share_workers_and_get_their_own_answers(farm: Farm) -> None:
    gateways = [farm.gateway(), farm.gateway()]
    for _ in range(2):
        farm.worker()
    for server in gateways:
        ready(server)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    pictures = [("green", GOOD), ("red", png(red))]
    with ThreadPoolExecutor(8) as clients:
        asked = [
            (label, clients.submit(classify, server, picture))
            for _ in range(10)
            for server, (label, picture) in zip(gateways, pictures, strict=True)
        ]
        assert all(answer.result().json()["label"] == label for label, answer in asked)


def test_a_gateway_needs_no_torch_and_little_memory(farm: Farm) -> None:
    port = own_redis.free_port()
    given = {"QUEUE": "redis", "REDIS_URL": farm.redis.url, "PORT": str(port), "DEFAULT_MODEL": "colors"}
    tells = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    root = Path(__file__).parents[2]
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
