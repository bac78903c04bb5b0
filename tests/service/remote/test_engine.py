"""Workers around a real Redis: what waits is run, whoever dies."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from service.remote.queue import RemoteQueue
from service.remote.store import ANSWERS, PARKED
from tests.service import own_redis
from tests.service.conftest import Server, until
from tests.service.fakes import marked, png
from tests.service.farm import GOOD, STREAM, Farm, at_once, classify, ready
from tests.service.own_redis import DEADLY_VALUE

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)


def test_images_that_wait_together_run_together(farm: Farm) -> None:
    server = farm.gateway(max_batch_size=8)
    farm.worker(delay_s=0.3, max_batch_size=8)
    ready(server)
    classify(server)
    started = time.monotonic()
    assert {response.status_code for response in at_once(server, 16)} == {200}
    assert time.monotonic() - started < 16 * 0.3 / 2  # one by one it is 4.8 s


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
    farm.worker(delay_s=0.5)
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
    assert [worker.poll() for worker in farm.workers].count(-9) == 3  # whichever took it
    assert farm.redis.client().xlen(PARKED) == 1
    until(lambda: farm.waiting() == 0)


def _keep_two(farm: Farm, stopping: threading.Event) -> None:
    """Start workers anew as they die, as an orchestrator does."""
    while not stopping.is_set():
        if sum(worker.poll() is None for worker in farm.workers) < 2:
            farm.worker()
        time.sleep(0.05)


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
