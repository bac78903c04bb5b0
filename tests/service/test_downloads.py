"""Large answers and clients that do not read them."""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np
import pytest

from tests.service.conftest import Running, until
from tests.service.fakes import encoded

SIDE = 2000
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
SAMPLES = 3 * SIDE * SIDE
"""As many bytes does the answer have at least: noise does not compress."""


def ask_and_do_not_read(server: Running, route: str = "/purify") -> socket.socket:
    upload = encoded(NOISE, "JPEG", quality=50)
    sent = {"files": {"images": upload}} if route.endswith("batch") else {"content": upload}
    request = server.client.build_request("POST", f"{route}?defense=none&size=original", **sent)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    client.sendall(f"POST {request.url.raw_path.decode()} HTTP/1.1\r\n{headers}\r\n".encode() + request.read())
    return client


@pytest.mark.parametrize("route", ["/purify", "/purify/batch"])
def test_an_answer_counts_as_memory_until_its_client_has_it(start: Callable[..., Running], route: str) -> None:
    server = start()
    budget = server.gateway.uploads
    with ask_and_do_not_read(server, route):
        until(lambda: budget.held > SAMPLES / 2 and not server.gateway._in_flight)
    until(lambda: budget.held == 0)
    assert server.still_answers()


def test_a_client_that_does_not_read_is_cut_off(start: Callable[..., Running]) -> None:
    server = start(body_timeout_s=0.2)
    budget = server.gateway.uploads
    with ask_and_do_not_read(server):
        until(lambda: budget.held > 0 and not server.gateway._in_flight)
        until(lambda: budget.held == 0)
        until(lambda: 'clarifier_rejected_total{reason="client_left"} 1.0' in server.client.get("/metrics").text)
    assert server.still_answers()


def test_an_answer_without_room_is_refused(start: Callable[..., Running]) -> None:
    server = start()
    url = "/purify?defense=none&size=original"
    photo = encoded(NOISE[:100, :100], "JPEG", quality=50)
    assert len(server.client.post(url, content=photo).content) > len(photo) + 100
    server.gateway.uploads.limit = len(photo) + 100
    assert server.client.post("/purify?defense=none", content=photo).status_code == 200
    server.refuses(server.client.post(url, content=photo), 429, "queue_full")
