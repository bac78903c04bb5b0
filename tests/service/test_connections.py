"""Bytes on a socket: what is no request, what takes too long to become one, and very many of both."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from threading import Thread

import httpx
import psutil
import pytest

from service.connections import MAX_HEAD_BYTES
from service.middleware import MAX_HEADERS
from tests.service.conftest import Running, running, until
from tests.service.fakes import FakeBundle, green, png
from tests.service.test_main import process

GOOD = png(green())
LIVE = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /classify?defense=none HTTP/1.1\r\nHost: h\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeBundle(), body_timeout_s=1) as started:
        yield started


def exchange(port: int, message: bytes) -> bytes:
    """What the server answers to `message` and nothing more, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with suppress(OSError):  # it may have had enough
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = list[bytes]()
    with suppress(ConnectionResetError):  # it had not read all of ours
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


def body_of(answer: bytes) -> dict[str, object]:
    problem: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return problem


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde",
        b"Content-Length: -5\r\n\r\nabcde",
        b"Content-Length: +5\r\n\r\nabcde",
        b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
        b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_row_6_two_readings_of_where_a_body_ends_are_400_and_nothing_behind_is_a_request(
    server: Running, framing: bytes
) -> None:
    refused = server.metric("clarifier_rejected_total", reason="malformed_http")
    answer = exchange(server.port, POST + framing + LIVE)
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1
    assert server.metric("clarifier_rejected_total", reason="malformed_http") == refused + 1
    assert server.still_answers()


@pytest.mark.parametrize("header", [b"X-A: a\0b", b"X-A: a\rb", b"X-A: a\r\n b", b"X-A : a", b": a", b"X-A"])
def test_row_7_a_header_that_two_could_read_differently_is_400(server: Running, header: bytes) -> None:
    assert status_of(exchange(server.port, b"GET /livez HTTP/1.1\r\nHost: h\r\n" + header + b"\r\n\r\n")) == 400
    assert server.still_answers()


@pytest.mark.parametrize(
    "headers",
    [
        b"X-A: " + b"a" * MAX_HEAD_BYTES,
        b"\r\n".join(b"X-%d: a" % number for number in range(MAX_HEADERS)),
        b"\r\n".join(b"X-%d: a" % number for number in range(10_000)),
    ],
)
def test_row_7_headers_that_are_too_many_or_too_long_are_431(server: Running, headers: bytes) -> None:
    answer = exchange(server.port, b"GET /livez HTTP/1.1\r\nHost: h\r\n" + headers + b"\r\n\r\n")
    assert status_of(answer) == 431
    assert body_of(answer)["code"] == "headers_too_large"
    assert server.still_answers()


def test_row_7_headers_without_an_end_are_cut_off(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-A: ")
        sent = 0
        with suppress(OSError):
            while sent < 50 * MAX_HEAD_BYTES:  # far less fits into the buffers between us
                sent += connection.send(b"a" * 65536)
        assert sent < 50 * MAX_HEAD_BYTES
    until(lambda: server.metric("clarifier_rejected_total", reason="headers_too_large"))
    assert server.still_answers()


@pytest.mark.parametrize("start", [b"GET /livez HTTP/1.1\r\nHost: h\r\n", b"GET", LIVE + b"GET"])
def test_row_5_a_head_that_does_not_end_is_408(server: Running, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(start)
        answer = read(connection)
    assert b"HTTP/1.1 408 " in answer
    assert server.still_answers()


def test_a_head_in_many_pieces_and_a_second_one_later_are_answered(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for _ in range(2):
            for byte in LIVE:
                connection.sendall(bytes([byte]))
            assert status_of(connection.recv(65536)) == 200
        time.sleep(1.5)  # longer than a head may take
        connection.sendall(LIVE)
        assert status_of(connection.recv(65536)) == 200


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"CONNECT"])
def test_row_9_a_wrong_method_is_405_and_says_which_is_right(server: Running, method: bytes) -> None:
    answer = exchange(server.port, method + b" /classify HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert status_of(answer) == 405
    assert b"\r\nallow: POST\r\n" in answer
    assert body_of(answer)["code"] == "method_not_allowed"


def test_row_9_a_head_has_the_headers_of_its_get_and_no_body(server: Running) -> None:
    get, head = (
        exchange(server.port, method + LIVE[3:].replace(b"Host: h", b"Host: h\r\nConnection: close"))
        for method in (b"GET", b"HEAD")
    )
    assert status_of(head) == status_of(get) == 200
    assert b"content-length: 17\r\n" in head
    assert get.partition(b"\r\n\r\n")[2]
    assert not head.partition(b"\r\n\r\n")[2]


def test_row_9_http_1_0_is_answered_and_closed(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(POST.replace(b"/1.1", b"/1.0") + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD)
        answer = read(connection)
    assert status_of(answer) == 200
    assert body_of(answer)["label"] == "green"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS greeting
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"BREW /coffee HTTP/1.1\r\n\r\n",
        b"\0" * 1000,
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ],
)
def test_row_9_what_is_not_http_is_400(server: Running, garbage: bytes) -> None:
    assert status_of(exchange(server.port, garbage)) == 400
    assert server.still_answers()


OFFERS = (  # what curl --http2 sends, and a browser
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n",
)
SIZED = b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket"])
@pytest.mark.parametrize("framed", [SIZED, CHUNKED], ids=["sized", "chunked"])
def test_row_9_another_protocol_that_is_offered_is_not_taken_up(server: Running, offer: bytes, framed: bytes) -> None:
    message = POST + offer + framed
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for pieces in ([message], [message[: -len(framed)], framed], [message[i : i + 1] for i in range(len(message))]):
            for piece in pieces:
                connection.sendall(piece)
            answer = connection.recv(65536)
            assert status_of(answer) == 200
            assert body_of(answer)["label"] == "green"


def test_row_9_what_follows_an_offer_is_its_body_and_then_the_next_request(server: Running) -> None:
    hidden = POST + OFFERS[0] + b"Content-Length: %d\r\n\r\n" % len(LIVE) + LIVE
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(hidden)
        answer = connection.recv(65536)
    assert status_of(answer) == 415  # it is no image, and no request either
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("offer", [b"", *OFFERS], ids=["no offer", "h2c", "websocket"])
def test_row_14_very_many_requests_in_one_go_are_all_answered(server: Running, offer: bytes) -> None:
    one = LIVE[:-2] + offer + b"X-A: " + b"a" * 1000 + b"\r\n\r\n"
    last = LIVE.replace(b"Host: h", b"Host: h\r\nConnection: close")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        sending = Thread(target=connection.sendall, args=[500 * one + last])
        sending.start()
        answers = read(connection)
        sending.join()
    assert answers.count(b"HTTP/1.1 200 ") == 501


@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket"])
@pytest.mark.parametrize("rest", [b"Content-Length: -5\r\n\r\n", b"X-A: a\0b\r\n\r\n"], ids=["length", "header"])
def test_row_9_an_offer_makes_nothing_sound_that_is_not(server: Running, offer: bytes, rest: bytes) -> None:
    assert b"HTTP/1.1 400 " in exchange(server.port, POST + offer + rest)
    assert server.still_answers()


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/models/..%2f..%2fetc%2fpasswd",
        "/problems/%2e%2e/%2e%2e",
        "//livez",
        "/models/%00",
        "/%zz",
    ],
)
def test_row_10_a_path_that_leads_elsewhere_is_404(server: Running, path: str) -> None:
    answer = exchange(server.port, f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == 404
    assert body_of(answer)["code"] in ("not_found", "unknown_model")
    assert b"passwd" not in answer


@pytest.mark.parametrize("length", [70_000, 1_000_000])
def test_row_10_an_address_without_an_end_is_414_or_431(server: Running, length: int) -> None:
    assert status_of(exchange(server.port, b"GET /" + b"a" * length + b" HTTP/1.1\r\nHost: h\r\n\r\n")) in (414, 431)
    assert server.still_answers()


def test_row_14_requests_in_one_go_are_answered_in_their_order(server: Running) -> None:
    head = POST + b"Content-Length: %d\r\n" % len(GOOD)
    message = b"".join(head + b"X-Request-Id: %d\r\n\r\n" % number + GOOD for number in range(20))
    last = POST + b"Content-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(message + last)
        answers = read(connection).split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [200] * 20 + [400]
    assert [json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"] for answer in answers[:20]] == [
        str(number) for number in range(20)
    ]


def test_row_14_a_client_that_asks_first_is_told_to_go_on(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(GOOD))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(GOOD)
        assert status_of(connection.recv(65536)) == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (POST + b"Content-Length: 99999999\r\n", 413),
        (POST.replace(b"none", b"unheard") + b"Content-Length: 999\r\n", 422),
        (POST + b"Content-Type: text/plain\r\nContent-Length: 999\r\n", 415),
    ],
)
def test_row_14_a_client_that_asks_first_is_refused_before_its_body(server: Running, head: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
        answer = read(connection)
    assert status_of(answer) == status
    assert b"100 Continue" not in answer
    assert server.still_answers()


# --- many, against a process of its own


def connect(stack: ExitStack, port: int) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))


def answers(client: httpx.Client) -> bool:
    """Whether probes and images are answered."""
    image = client.post("/classify?defense=none", content=GOOD)
    return client.get("/livez").status_code == client.get("/readyz").status_code == image.status_code == 200


@pytest.mark.slow
def test_row_5_five_hundred_clients_that_send_a_byte_at_a_time_are_408_and_probes_answer() -> None:
    body = POST + b"Content-Length: 9999\r\n\r\n"

    async def dawdle(port: int, number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(body if number % 2 else POST)
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            writer.write(b"x")
            await asyncio.wait([reading], timeout=0.5)
        writer.transport.abort()
        await asyncio.sleep(0)
        cut_off = isinstance(reading.exception(), ConnectionError)  # by the bytes that it sent after its answer
        return 408 if cut_off else status_of(reading.result())

    async def all_of_them(client: httpx.Client) -> list[int]:
        port = client.base_url.port
        assert port is not None
        dawdling = asyncio.gather(*(dawdle(port, number) for number in range(500)))
        looks = 0
        while not dawdling.done():
            looks += await asyncio.to_thread(answers, client)
            await asyncio.sleep(0.2)
        assert looks
        return await dawdling

    with process(0, CLARIFIER_BODY_TIMEOUT_S="5") as (_, client):
        assert asyncio.run(all_of_them(client)) == [408] * 500
        assert answers(client)


@pytest.mark.slow
def test_row_13_ten_thousand_idle_connections_keep_nobody_from_an_answer() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, soft - 500)
    with process(0) as (started, client), ExitStack() as stack:
        port = client.base_url.port
        assert port is not None
        for number in range(count):
            connection = connect(stack, port)
            if number % 2:  # half of them have asked something before
                connection.sendall(LIVE)
        until(lambda: psutil.Process(started.pid).num_fds() > count, 60)
        assert answers(client)


@pytest.mark.slow
def test_row_78_without_file_descriptors_it_goes_on_with_those_it_has_and_recovers() -> None:
    with process(0) as (started, client), ExitStack() as stack:
        port = client.base_url.port
        assert port is not None
        assert answers(client)  # over a connection that stays open
        resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (64, 64))
        crowd = [connect(stack, port) for _ in range(100)]
        until(lambda: psutil.Process(started.pid).num_fds() >= 60)
        assert answers(client)
        before = cpu_s(started)
        time.sleep(2)
        assert cpu_s(started) - before < 1
        assert answers(client)
        for connection in crowd:
            connection.close()
        with httpx.Client(base_url=client.base_url, timeout=30) as newcomer:
            until(lambda: is_answered(newcomer))


def is_answered(client: httpx.Client) -> bool:
    try:
        return answers(client)
    except httpx.TransportError:
        return False


def cpu_s(started: subprocess.Popen[str]) -> float:
    times = psutil.Process(started.pid).cpu_times()
    return times.user + times.system
