"""What the machine around the service may do to it, and what crowds may."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
import socket
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from service.logs import JsonFormatter, TextFormatter
from tests.service.conftest import Running, until
from tests.service.fakes import batch, green, png
from tests.service.test_main import process

GOOD = png(green())
CANARY = "canary-4711"
HOSTILE = f"{CANARY}\r\nINFO forged <script>"


@pytest.mark.slow
def test_row_12_of_a_thousand_clients_a_third_leaves_and_every_other_is_answered() -> None:
    chance = random.Random(0)
    leaves = [chance.random() < 0.3 for _ in range(1000)]
    head = f"POST /classify?defense=none HTTP/1.1\r\nHost: h\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()

    async def ask(port: int, number: int, gate: asyncio.Semaphore) -> bool:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + GOOD[: number % len(GOOD) if leaves[number] and number % 2 else None])
            if leaves[number]:
                await asyncio.sleep(chance.random() / 50)
                writer.transport.abort()
                return True
            answer = await reader.readuntil(b"\r\n")
            writer.transport.abort()
            return answer.split()[1] == b"200"

    async def all_of_them(port: int) -> list[bool]:
        gate = asyncio.Semaphore(200)  # of 256 that may wait
        return await asyncio.gather(*(ask(port, number, gate) for number in range(1000)))

    with process(0.001) as (_, client):
        assert asyncio.run(all_of_them(client.base_url.port or 0)) == [True] * 1000
        until(lambda: "clarifier_queue_depth 0.0" in client.get("/metrics").text)
        assert client.post("/classify?defense=none", content=GOOD).status_code == 200


def test_row_55_a_clock_that_jumps_by_an_hour_ends_nothing_and_prolongs_nothing(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(rate_limit="8/hour", cache_ttl_s=60.0, request_timeout_ms=20_000)
    real, jump_s = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() + jump_s[0])

    def ask(**headers: str) -> int:
        return server.client.post("/classify?defense=none", content=GOOD, headers=headers).status_code

    for jump_s[0] in (0, 3600, -3600, 0):
        assert ask() == ask(**{"X-Request-Timeout-Ms": "15000"}) == 200
        assert server.client.get("/readyz").status_code == server.client.get("/livez").status_code == 200
    assert server.metric("clarifier_cache_requests_total", result="hit") == 7
    for jump_s[0] in (7200, -7200):
        response = server.client.post("/classify?defense=none", content=GOOD)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 3603


def test_row_73_without_a_disk_uploads_are_answered_since_none_is_written() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    large = png(noise)
    assert len(large) > 4_000_000
    with process(0, TMPDIR="/nowhere", CLARIFIER_BODY_TIMEOUT_S="60") as (started, client):
        resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (0, 0))  # any byte into a file fails, as on a full disk
        form = client.post("/classify?defense=none", files={"image": ("a.png", large)})
        raw = client.post("/purify?defense=aid", content=large)
        several = client.post("/purify/batch?defense=aid&size=original", files=batch(large, GOOD))
        assert (form.status_code, raw.status_code, several.status_code) == (200, 200, 200)
        assert client.get("/metrics").status_code == 200


def test_row_74_nothing_is_sent_to_anybody_who_could_be_unreachable() -> None:
    collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PROMETHEUS_PUSHGATEWAY": "127.0.0.1:9"}
    with process(0, **collector) as (started, client):
        for _ in range(5):
            assert client.post("/classify", content=GOOD).status_code == 200
        connections = psutil.Process(started.pid).net_connections("inet")
        assert {connection.laddr.port for connection in connections} == {client.base_url.port}


def test_row_76_an_interrupt_ends_as_sigterm_does() -> None:
    with process(0) as (started, client):
        assert client.post("/classify", content=GOOD).status_code == 200
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 0


def test_row_78_one_processor_is_enough() -> None:
    with process(0) as (started, client):
        psutil.Process(started.pid).cpu_affinity([psutil.Process().cpu_affinity()[0]])
        answers = client.post("/classify/batch?defense=none", files=batch(*[GOOD] * 8)).json()["results"]
        assert [answer["label"] for answer in answers] == ["green"] * 8
        assert client.get("/readyz").status_code == 200


def test_row_82_nothing_that_a_client_says_forges_a_line_or_comes_back_as_markup(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = start()
    client = server.client
    answers = [
        client.post("/classify", params={"model": HOSTILE}, content=GOOD),
        client.post("/classify", params={"defense": HOSTILE}, content=GOOD),
        client.post("/classify", params={HOSTILE: "1"}, content=GOOD),
        client.post("/classify", content=GOOD, headers={"Content-Type": f"{CANARY}/<script>"}),
        client.post("/classify", content=GOOD, headers={"X-Request-Id": f"{CANARY} <script>"}),
        client.post("/classify", content=GOOD, headers={"X-Request-Timeout-Ms": f"{CANARY} <script>"}),
        client.post("/classify", content=GOOD, headers={"Authorization": f"Bearer {CANARY}", "Cookie": CANARY}),
        client.post("/classify", files={"image": (HOSTILE, GOOD, "image/png")}),
        client.post("/classify", files={HOSTILE: ("a", GOOD, "image/png")}),
        client.post("/purify", content=GOOD, headers={"Accept": f"{CANARY}/<script>"}),
        client.post("/v2/models/colors/infer", json={"inputs": [{"name": HOSTILE, "shape": [1], "datatype": HOSTILE}]}),
        client.post("/v2/models/colors/infer", json={HOSTILE: 1, "inputs": []}),
        client.get(f"/models/{CANARY}%0d%0a<script>"),
        client.get(f"/problems/{CANARY}<script>"),
        client.get(f"/{CANARY}%0d%0a<script>"),
        client.get("/metrics"),
        client.get("/openapi.json"),
    ]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"GET /{CANARY} HTTP/1.1\r\nno header at all <script>\r\n\r\n".encode())
        assert b"400" in connection.recv(65536)
    assert {200, 404, 406, 415, 422} <= {answer.status_code for answer in answers}
    for answer in answers:
        assert "<script" not in answer.text + str(answer.headers), answer.url
        assert "forged" not in answer.headers
    ours = [record for record in caplog.records if not record.name.startswith(("http", "asyncio"))]
    assert ours
    for formatter in (JsonFormatter(), TextFormatter()):
        lines = [formatter.format(record) for record in ours]
        assert not [line for line in lines if CANARY in line or "script" in line]
    assert CANARY not in client.get("/metrics").text


def test_row_83_a_score_has_too_few_digits_to_climb_on(service: Running) -> None:
    images = [png(np.random.default_rng(seed).integers(5, 256, (8, 8, 3), np.uint8)) for seed in range(20)]
    explained = [service.client.post("/classify?explain=true&defense=none", content=image).json() for image in images]
    detected = [service.client.post("/detect", content=image).json() for image in images]
    scores = [answer["aid_score"] for answer in [*explained, *detected]]
    assert scores == [round(score, 3) for score in scores]
    assert len(set(scores)) > 10
