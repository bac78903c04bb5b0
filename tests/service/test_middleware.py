"""What every request has around it."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from service import routes
from service.app import create_app
from service.entropy import Entropy
from service.metrics import Metrics
from service.middleware import RequestMiddleware
from tests.service.conftest import Running, until
from tests.service.fakes import green, png

GOOD = png(green())


def test_a_sound_request_id_is_kept_and_returned(service: Running) -> None:
    response = service.client.post("/classify", content=GOOD, headers={"x-request-id": "My-id_1.0"})
    assert response.headers["x-request-id"] == "My-id_1.0"
    assert response.json()["request_id"] == "My-id_1.0"


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "a\tb", "<b>", "é"])
def test_another_request_id_is_replaced(service: Running, offered: str) -> None:
    response = service.client.get("/livez", headers={b"x-request-id": offered.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_ids_are_not_repeated(service: Running) -> None:
    assert len({service.client.get("/livez").headers["x-request-id"] for _ in range(5)}) == 5


def test_stage_times_are_sent(service: Running) -> None:
    header = service.client.post("/purify", content=GOOD).headers["server-timing"]
    assert [entry.split(";")[0] for entry in header.split(", ")] == ["decode", "queue", "purify", "encode"]
    assert "server-timing" not in service.client.get("/livez").headers


def exchange(port: int, head: bytes) -> bytes:
    """Send `head` and read what comes at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head)
        return connection.recv(65536).lower()


def test_a_connection_whose_body_was_not_read_is_closed(service: Running) -> None:
    unread = exchange(service.port, b"POST /nowhere HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
    assert b"connection: close" in unread
    none = exchange(service.port, b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
    assert b"connection: close" not in none


def test_a_connection_whose_body_was_read_is_kept_after_an_error(service: Running) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n\r\nno image"
    answer = exchange(service.port, head)
    assert b" 415 " in answer.splitlines()[0]
    assert b"connection: close" not in answer


def test_the_server_does_not_say_what_it_is_made_of(service: Running) -> None:
    response = service.client.get("/livez")
    assert not {"x-powered-by", "via"} & set(response.headers)


def test_row_13_requests_beyond_the_limit_are_503_and_probes_answer() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/slow":
                await gate.wait()
            await Response("done")(scope, receive, send)

        transport = httpx.ASGITransport(RequestMiddleware(app, Metrics(), Entropy(), max_active=2))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            slow = [asyncio.create_task(client.get("/slow")) for _ in range(2)]
            await asyncio.sleep(0.01)
            excess = await client.get("/slow")
            assert (excess.status_code, excess.json()["code"]) == (503, "too_busy")
            assert excess.headers["content-type"] == "application/problem+json"
            assert excess.headers["retry-after"]
            assert (await client.get("/livez")).text == "done"
            gate.set()
            assert [(await one).text for one in slow] == ["done", "done"]
            assert (await client.get("/slow")).text == "done"

    asyncio.run(scenario())


def test_an_engine_route_that_fails_in_an_unforeseen_way_is_500_and_logged(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()

    def broken(*_: object) -> None:
        raise RuntimeError("nobody thought of it")

    with monkeypatch.context() as patch:
        patch.setattr(routes, "_classify_response", broken)
        response = server.client.post("/classify", content=GOOD)
    assert (response.status_code, response.json()["code"]) == (500, "internal_server_error")
    assert response.headers.get_list("x-request-id") == [response.json()["request_id"]]
    labels = {"route": "/classify", "status": "500"}
    until(
        lambda: any(
            labels.items() <= sample.labels.items()
            for metric in server.gateway.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "clarifier_requests_total"
        )
    )
    assert server.still_answers()


@pytest.mark.parametrize("path", ["/classify", "/classify/batch", "/purify", "/purify/batch", "/detect"])
def test_other_methods_of_an_engine_route_are_the_frameworks_to_answer(service: Running, path: str) -> None:
    response = service.client.get(path)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


def test_an_engine_route_below_another_application_is_found_too(service: Running) -> None:
    async def scenario() -> httpx.Response:
        outer = Starlette(routes=[Mount("/below", app=create_app(service.gateway.settings))])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://test") as client:
            return await client.post("/below/classify", content=GOOD)

    response = asyncio.run(scenario())
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")  # its lifespan never began


def test_no_header_is_sent_twice(service: Running) -> None:
    for response in (service.client.post("/classify", content=GOOD), service.client.post("/classify", content=b"no")):
        names = [name for name, _ in response.headers.multi_items()]
        assert len(names) == len(set(names))
