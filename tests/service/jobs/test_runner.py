"""Jobs whose workers, gateways and Redis die, or are told lies: each image is answered once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.jobs.store import JOB, JOBS
from tests.service import own_redis
from tests.service.conftest import Server, until
from tests.service.fakes import batch, green, marked, png
from tests.service.farm import GOOD, Farm, classify, ready
from tests.service.jobs.test_routes import color, done, lines, post
from tests.service.own_redis import DEADLY_VALUE

pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)

IMAGES = 200


def numbered(number: int) -> bytes:
    """An image that its answer tells from any other: its mean."""
    pixels = np.full((8, 8, 3), 20 + number % 200, np.uint8)
    pixels[..., number % 3] = 250
    return png(pixels)


def done_count(farm: Farm, job: str) -> int:
    return int(farm.redis.client().hlen(f"{JOB}{job}:results"))


def test_a_job_whose_worker_is_killed_twice_ends_complete_each_image_once(farm: Farm) -> None:
    server = farm.gateway()
    worker = farm.worker(max_batch_size=4, delay_s=0.05)
    ready(server)
    made = post(server, *map(numbered, range(IMAGES)))
    job = made.json()["id"]
    for killed_at in (20, 120):
        until(lambda at=killed_at: done_count(farm, job) >= at, 60)  # type: ignore[misc]
        worker.kill()
        worker = farm.worker(max_batch_size=4, delay_s=0.05)
    answers = lines(server, made)
    assert [answer["index"] for answer in answers] == [number % 3 for number in range(IMAGES)]
    assert done(server, made)["failed"] == 0
    assert server.metric("clarifier_job_images_total", outcome="done") == IMAGES
    until(lambda: farm.waiting() == 0)
    until(lambda: server.metric("clarifier_queue_depth") == 0)


def test_a_gateway_that_dies_leaves_its_job_to_another(farm: Farm) -> None:
    farm.worker(max_batch_size=2, delay_s=0.1)
    with gateway_process(farm) as (first, address):
        made = httpx.post(f"{address}/jobs", files=batch(*map(numbered, range(IMAGES))))
        job = made.json()["id"]
        until(lambda: done_count(farm, job) >= 20, 60)
        first.kill()
    assert done_count(farm, job) < IMAGES
    second = farm.gateway()
    answers = lines(second, made)
    assert [answer["index"] for answer in answers] == [number % 3 for number in range(IMAGES)]
    assert len({answer["seed"] for answer in answers}) == IMAGES
    labels = ("red", "green", "blue")
    ran = sum(second.metric("clarifier_predictions_total", model="colors@1", label=label) for label in labels)
    assert ran <= IMAGES - 20  # what had its answer was not run again
    until(lambda: farm.waiting() == 0, 90)


def test_a_gateway_that_ends_gives_its_job_back_at_once(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.runner.LEASE_MS", 600_000)  # it is not waited for
    farm.worker(max_batch_size=2, delay_s=0.1)
    first = farm.gateway()
    ready(first)
    made = post(first, *map(numbered, range(IMAGES)))
    job = made.json()["id"]
    until(lambda: done_count(farm, job) >= 4)
    first.gateway.draining = True  # as SIGTERM does
    until(lambda: farm.redis.client().get(f"{JOB}{job}:lease") is None)
    until(lambda: farm.waiting() == 0)
    assert done_count(farm, job) < IMAGES
    second = farm.gateway()
    ready(second)
    assert len(lines(second, made)) == IMAGES
    assert second.metric("clarifier_job_images_total", outcome="done") < IMAGES


def test_an_image_that_kills_its_workers_is_an_error_in_its_place(farm: Farm) -> None:
    server = farm.gateway()
    for _ in range(4):  # three die
        farm.worker()
    ready(server)
    made = post(server, GOOD, png(marked(DEADLY_VALUE)), GOOD)
    answers = lines(server, made)
    assert [answer.get("code", "fine") for answer in answers] == ["fine", "inference_failed", "fine"]
    assert done(server, made)["failed"] == 1


def test_a_redis_that_is_gone_for_a_while_is_waited_for(farm: Farm) -> None:
    server = farm.gateway()
    farm.worker(max_batch_size=2, delay_s=0.05)
    ready(server)
    made = post(server, *map(numbered, range(100)))
    until(lambda: done_count(farm, made.json()["id"]) >= 4)
    process = farm.redis.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: server.client.get(made.headers["location"]).status_code == 503)
    finally:
        process.send_signal(signal.SIGCONT)
    assert len(lines(server, made)) == 100
    assert server.metric("clarifier_redis_errors_total", op="jobs") > 0


def test_those_who_wait_find_room_in_the_queue_beside_jobs(farm: Farm) -> None:
    server = farm.gateway(max_queue_size=8, max_batch_size=2)
    other = farm.gateway(max_queue_size=8, max_batch_size=2)
    farm.worker(max_batch_size=1, delay_s=0.05)
    for gateway in (server, other):
        ready(gateway)
    made = [post(gateway, *[GOOD] * 60) for gateway in (server, other)]
    most = 0
    with ThreadPoolExecutor(2) as clients:
        for _ in range(20):
            most = max(most, farm.waiting())
            both = [clients.submit(classify, gateway) for gateway in (server, other)]
            assert [each.result().status_code for each in both] == [200, 200]
    assert 0 < most <= 4
    for each in made:
        done(server, each)


FORGED: list[tuple[str, Any]] = [
    ("spec", b"{"),
    ("spec", b"[" * 100_000),
    ("spec", b""),
    ("failed", b"many"),
    ("starts", [0, 3, 2]),
    ("starts", []),
    ("images", -1),
    ("images", 2**80),
    ("votes", "1"),
    ("defense", "zeropur,nothing"),
    ("input_size", [9, 9]),
    ("id", "0" * 32),
    ("more", 1),
]


@pytest.mark.parametrize(("name", "value"), FORGED)
def test_row_72_a_forged_job_is_left_out(name: str, value: Any, shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    malformed = server.metric("clarifier_redis_errors_total", op="malformed")
    redis: Any = farm.redis.client()
    template = json.loads(redis.hget(JOB + post(server, GOOD).json()["id"], "spec") or b"")
    job = "f" * 32
    fields = {"spec": json.dumps({**template, "id": job}).encode(), "failed": b"0"}
    if name in fields:
        fields[name] = value
    else:
        fields["spec"] = json.dumps({**template, "id": job, name: value}).encode()
    redis.hset(JOB + job, mapping=fields)
    redis.zadd(JOBS, {job: 0})
    until(lambda: not redis.exists(JOB + job))
    assert server.client.get(f"/jobs/{job}").status_code == 404
    assert server.metric("clarifier_redis_errors_total", op="malformed") > malformed
    assert classify(server).status_code == 200


@pytest.mark.parametrize("part", ["", ":inputs", ":results"])
def test_row_72_a_key_of_another_type_is_left_out(part: str, shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    redis = farm.redis.client()
    made = post(server, GOOD)
    done(server, made)
    job, copy = made.json()["id"], "e" * 32
    spec = json.loads(redis.hget(JOB + job, "spec") or b"")
    redis.hset(JOB + copy, mapping={"spec": json.dumps({**spec, "id": copy}), "failed": 0})
    redis.set(JOB + copy + part, "text")
    redis.zadd(JOBS, {copy: 0})
    assert server.client.get(f"/jobs/{copy}").status_code in (200, 404)
    until(lambda: not redis.exists(JOB + copy))
    assert classify(server).status_code == 200


@pytest.mark.parametrize("chunk", [b"", b"[]\n", b"[[0, 1, 1.0]]\nshort", b"[[5, 1, 1.0]]\n" + green().tobytes(), b"{"])
def test_row_72_images_whose_input_is_lost_are_errors_in_their_place(chunk: bytes, farm: Farm) -> None:
    server = farm.gateway(max_batch_size=2)
    farm.worker(max_batch_size=1, delay_s=0.05)
    ready(server)
    made = post(server, *map(color, range(35)))
    job = made.json()["id"]
    farm.redis.client().hset(f"{JOB}{job}:inputs", "32", chunk)  # long before it is read
    answers = lines(server, made)
    assert {answer.get("code") for answer in answers[:32]} == {None}
    assert {answer.get("code") for answer in answers[32:]} == {"inference_failed"}
    assert server.metric("clarifier_redis_errors_total", op="malformed") == 1


def test_row_72_forged_results_are_errors_in_their_place(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    for operation in ("classify", "purify"):
        made = post(server, *[GOOD] * 5, query=f"?operation={operation}")
        done(server, made)
        key = f"{JOB}{made.json()['id']}:results"
        for number, forged in enumerate((b"", b"{}", b'{"label": "green"}\n', b"\x80" * 99)):
            farm.redis.client().hset(key, str(number), forged)
        farm.redis.client().hset(key, "x", b"y")
        answer = server.client.get(made.headers["location"] + "/result")
        assert answer.status_code == 200
        assert answer.content.count(b"the answer was lost") >= 4


def test_a_broken_result_is_broken_off(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    made = post(server, *[GOOD] * 100)
    done(server, made)
    farm.redis.client().hdel(f"{JOB}{made.json()['id']}:results", "99")
    farm.redis.client().hset(f"{JOB}{made.json()['id']}:results", "x", b"y")
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.get(made.headers["location"] + "/result")


@contextmanager
def gateway_process(farm: Farm) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A gateway that can be killed, once it is ready, and its address."""
    port = own_redis.free_port()
    given = {"QUEUE": "redis", "REDIS_URL": farm.redis.url, "PORT": str(port), "DEFAULT_MODEL": "colors"}
    environment = {**os.environ, **{f"CLARIFIER_{name}": value for name, value in given.items()}}
    line = [sys.executable, "-m", "service"]
    with subprocess.Popen(line, cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: is_ready(f"http://127.0.0.1:{port}/readyz"), 60)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def is_ready(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False
