"""Deadlines, full queues, and clients who leave: what happens to a request between its arrival and its answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from service.app import decoder_threads
from service.dispatch import Places
from service.uploads import QUICK_FORM_BYTES
from service.work import Key
from tests.service.conftest import Running, until
from tests.service.fakes import green, png

GOOD = png(green())
LARGE = png(green(65))
"""Too large to be decoded at once: it needs one of the decoder threads."""
URL = "/classify?defense=none"


def hold(server: Running, clients: ThreadPoolExecutor) -> Future[httpx.Response]:
    """Keep the engine busy with one request until `server.bundle.gate` is set."""
    server.bundle.gate.clear()
    server.bundle.entered.clear()
    held = clients.submit(server.client.post, URL, content=GOOD)
    assert server.bundle.entered.wait(20)
    return held


@pytest.mark.parametrize("timeout", ["1", "20"])
def test_row_50_a_short_deadline_is_504_without_work(start: Callable[..., Running], timeout: str) -> None:
    server = start(max_queue_delay_ms=100)
    response = server.client.post(URL, content=GOOD, headers={"x-request-timeout-ms": timeout})
    assert response.status_code == 504
    assert server.bundle.batches == []
    server.refuses(response, 504, "deadline_exceeded")


def test_row_50_a_deadline_of_0_is_past(service: Running) -> None:
    response = service.client.post(URL, content=GOOD, headers={"x-request-timeout-ms": "0"})
    service.refuses(response, 504, "deadline_exceeded")


def test_row_50_a_deadline_of_ten_hours_is_capped(start: Callable[..., Running]) -> None:
    server = start(request_timeout_ms=1500.0)
    with ThreadPoolExecutor(2) as clients:
        held = hold(server, clients)
        response = server.client.post(URL, content=GOOD, headers={"x-request-timeout-ms": "36000000"})
        assert response.status_code == 504
        assert held.result().status_code == 504  # it ran when its time was up
        server.bundle.gate.set()


@pytest.mark.parametrize("timeout", ["-5", "NaN", "soon"])
def test_row_50_other_deadlines_are_422(service: Running, timeout: str) -> None:
    response = service.client.post(URL, content=GOOD, headers={"x-request-timeout-ms": timeout})
    problem = service.refuses(response, 422, "invalid_parameter")
    assert problem["errors"][0]["pointer"] == "#/header/X-Request-Timeout-Ms"


def test_row_50_the_deadline_covers_the_body(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        head = b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\nX-Request-Timeout-Ms: 50\r\n\r\n"
        connection.sendall(head + b"not all")
        assert b" 504 " in connection.recv(65536).splitlines()[0]
    assert service.still_answers()


def test_row_50_the_deadline_covers_the_wait_for_whoever_takes_a_form_apart(start: Callable[..., Running]) -> None:
    server = start()
    gate = threading.Event()
    blockers = [server.gateway.decoders.submit(gate.wait, 20) for _ in range(decoder_threads())]
    form = {"image": ("a.png", GOOD + bytes(QUICK_FORM_BYTES), "image/png")}
    response = server.client.post(URL, files=form, headers={"x-request-timeout-ms": "50"})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    gate.set()
    assert all(blocker.result() for blocker in blockers)


def test_row_48_what_exceeds_the_queue_is_429_and_what_was_accepted_is_answered(
    start: Callable[..., Running],
) -> None:
    server = start(max_queue_size=4, max_batch_size=4)
    with (
        ThreadPoolExecutor(48) as clients,
        httpx.Client(
            base_url=f"http://127.0.0.1:{server.port}", limits=httpx.Limits(max_connections=64), timeout=60
        ) as client,
    ):
        held = hold(server, clients)
        others = [clients.submit(client.post, URL, content=GOOD) for _ in range(40)]
        until(lambda: sum(other.done() for other in others) == 36)
        refused = [other.result() for other in others if other.done()]
        assert {response.status_code for response in refused} == {429}
        assert all(1 <= int(response.headers["retry-after"]) <= 5 for response in refused)
        assert server.client.get("/readyz").status_code == 200  # a full queue is no reason to leave
        assert server.metric("clarifier_queue_depth") == 4
        server.bundle.gate.set()
        assert held.result().status_code == 200
        assert [other.result().status_code for other in others].count(200) == 4
    assert server.metric("clarifier_rejected_total", reason="queue_full") == 36
    server.refuses(refused[0], 429, "queue_full")
    assert server.metric("clarifier_queue_depth") == 0


def test_a_full_queue_is_refused_before_the_body(start: Callable[..., Running]) -> None:
    server = start(max_queue_size=1, max_batch_size=1)
    with ThreadPoolExecutor(4) as clients:
        held = hold(server, clients)
        waiting = clients.submit(server.client.post, URL, content=GOOD)
        until(lambda: server.metric("clarifier_queue_depth") == 1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n")
            assert b" 429 " in connection.recv(65536).splitlines()[0]
        server.bundle.gate.set()
        assert (held.result().status_code, waiting.result().status_code) == (200, 200)


def test_row_11_a_client_that_leaves_while_queued_costs_nothing(start: Callable[..., Running]) -> None:
    server = start()
    with ThreadPoolExecutor(4) as clients:
        held = hold(server, clients)
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(GOOD)}\r\n\r\n"
            leaving.sendall(head.encode() + GOOD)
            until(lambda: server.metric("clarifier_queue_depth") == 1)
        until(lambda: server.metric("clarifier_queue_depth") == 0)
        staying = clients.submit(server.client.post, URL, content=GOOD)
        until(lambda: server.metric("clarifier_queue_depth") == 1)
        server.bundle.gate.set()
        assert (held.result().status_code, staying.result().status_code) == (200, 200)
    assert server.bundle.batches == [1, 1]
    labels = {"route": "/classify", "model": "colors@1", "defense": "none", "status": "499"}
    assert server.metric("clarifier_requests_total", **labels) == 1


def test_row_12_clients_that_leave_at_random_harm_nobody(start: Callable[..., Running]) -> None:
    server = start()

    def ask(number: int) -> int:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(GOOD)}\r\n\r\n"
            connection.sendall(head.encode() + GOOD[: -1 if number % 6 == 0 else None])
            return 0 if number % 3 == 0 else int(connection.recv(65536).split()[1])

    with ThreadPoolExecutor(16) as clients:
        statuses = list(clients.map(ask, range(90)))
    assert statuses == [0 if number % 3 == 0 else 200 for number in range(90)]
    until(lambda: server.metric("clarifier_queue_depth") == 0)
    assert server.still_answers()


def test_votes_count_only_where_something_is_drawn(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    assert server.gateway.batcher is not None
    admitted = list[int]()
    admit = server.gateway.batcher.admit

    def watched(places: Places, key: Key, *rest: Any) -> Any:
        admitted.append(key.votes)
        return admit(places, key, *rest)

    monkeypatch.setattr(server.gateway.batcher, "admit", watched)
    for defense in ("none", "aid", "zeropur", "atop", "atop,aid"):
        assert server.client.post(f"/classify?defense={defense}&votes=4", content=GOOD).status_code == 200
    assert admitted == [1, 1, 1, 4, 4]


def test_images_that_are_being_decoded_have_their_places(start: Callable[..., Running]) -> None:
    server = start(max_queue_size=2, max_batch_size=2)
    gate = threading.Event()
    blockers = [server.gateway.decoders.submit(gate.wait, 20) for _ in range(decoder_threads())]
    with ThreadPoolExecutor(4) as clients:
        decoding = [clients.submit(server.client.post, URL, content=LARGE) for _ in range(2)]
        batcher = server.gateway.batcher
        assert batcher is not None
        until(lambda: batcher._reserved == 2)
        excess = server.client.post(URL, content=GOOD)
        assert (excess.status_code, excess.json()["code"]) == (429, "queue_full")
        gate.set()
        assert [one.result().status_code for one in decoding] == [200, 200]
    assert all(blocker.result() for blocker in blockers)
    assert batcher._reserved == 0
    server.refuses(server.client.post(URL, content=b"no image"), 415, "unsupported_format")
    assert batcher._reserved == 0


def test_row_76_a_drain_answers_a_request_whose_body_is_still_coming(start: Callable[..., Running]) -> None:
    server = start()
    batcher = server.gateway.batcher
    assert batcher is not None
    head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + GOOD[:10])
        until(lambda: server.gateway._in_flight)
        server.gateway.begin_drain()
        refused = server.client.post(URL, content=GOOD)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert batcher.alive
        connection.sendall(GOOD[10:])
        assert b" 200 " in connection.recv(65536).splitlines()[0]
    until(lambda: not batcher.alive)


def test_a_body_that_outlasts_the_drain_is_answered_503(start: Callable[..., Running]) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\n\r\nabc")
        until(lambda: server.gateway._in_flight)
        (task,) = server.gateway._in_flight
        server.gateway.begin_drain()
        task.get_loop().call_soon_threadsafe(server.gateway.abandon)
        answer = connection.recv(65536)
    assert b" 503 " in answer.splitlines()[0]
    assert b'"draining"' in answer
