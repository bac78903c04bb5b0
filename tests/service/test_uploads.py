"""Bodies of requests: raw, multipart, broken, slow, too large."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from service.errors import BodyTooSlow, ClarifierError, DeadlineExceeded
from service.uploads import MAX_OPTIONS, Account, ByteBudget, Upload, _images_of, _read, batch_body_bytes, budget_bytes
from tests.service.conftest import Running, running, until
from tests.service.fakes import FakeBundle, encoded, green, png

LIMIT = 100_000
GOOD = png(green())
BOUNDARY = "b0undary"
MULTIPART = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A server that takes at most LIMIT bytes, within a second."""
    with running(FakeBundle(), max_image_bytes=LIMIT, body_timeout_s=1.0) as server:
        yield server


def part(name: str, content: bytes, *, file_name: str | None = "a.png", headers: bytes = b"") -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{file_name}"' if file_name is not None else "")
    head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n".encode()
    return head + headers + b"\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def raw_exchange(port: int, head: str, body: bytes = b"") -> tuple[bytes, float]:
    """Send bytes as they are and read until the server closes; the answer, and how long it took."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer, time.monotonic() - started


def problem_in(answer: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    problem: dict[str, object] = httpx.Response(status, content=body).json()
    return status, problem


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_a_raw_body_of_each_type_is_an_image(service: Running, kind: str) -> None:
    body = encoded(green(), kind.upper())
    response = service.client.post("/classify", content=body, headers={"content-type": f"image/{kind}"})
    assert response.json()["label"] == "green"


def test_the_multipart_field_image_is_an_image(service: Running) -> None:
    response = service.client.post("/classify", files={"image": ("cat.png", GOOD, "image/png")})
    assert response.json()["label"] == "green"


def test_a_chunked_body_is_an_image(service: Running) -> None:
    response = service.client.post("/classify", content=iter([GOOD[:10], GOOD[10:]]))
    assert response.json()["label"] == "green"


def test_row_1_no_body_is_400_empty_body(service: Running) -> None:
    service.refuses(service.client.post("/classify"), 400, "empty_body")
    service.refuses(service.client.post("/classify", headers=MULTIPART), 400, "empty_body")
    service.refuses(
        service.client.post("/purify", content=b"", headers={"content-type": "image/png"}), 400, "empty_body"
    )


def test_row_2_a_declared_length_over_the_limit_is_413_before_reading(small: Running) -> None:
    answer, _ = raw_exchange(
        small.port,
        f"POST /classify HTTP/1.1\nHost: h\nContent-Type: image/png\nContent-Length: {LIMIT + 1}\n\n",
    )
    status, problem = problem_in(answer)  # answered although not one byte of the body was sent
    assert (status, problem["code"]) == (413, "body_too_large")
    assert (problem["limit"], problem["actual"]) == (LIMIT, LIMIT + 1)
    assert small.still_answers()


def test_row_3_a_chunked_body_is_413_at_the_first_byte_over_and_the_connection_closes(small: Running) -> None:
    chunk = b"%x\r\n" % (LIMIT + 1) + bytes(LIMIT + 1) + b"\r\n"  # the last chunk never comes
    answer, _ = raw_exchange(small.port, "POST /classify HTTP/1.1\nHost: h\nTransfer-Encoding: chunked\n\n", chunk)
    status, problem = problem_in(answer)
    assert (status, problem["code"]) == (413, "body_too_large")
    assert b"connection: close" in answer.lower()
    assert small.still_answers()


def test_a_body_of_exactly_the_limit_is_read(small: Running) -> None:
    padded = GOOD + bytes(LIMIT - len(GOOD))  # what follows the end of a PNG is not looked at
    assert small.client.post("/classify", content=padded).status_code == 200
    assert small.client.post("/classify", files={"image": padded}).status_code == 200
    small.refuses(small.client.post("/classify", files={"image": padded + b"0"}), 413, "body_too_large")


@pytest.mark.parametrize(("seconds_left", "error"), [(5.0, DeadlineExceeded), (50.0, BodyTooSlow)])
def test_a_timer_that_rings_early_is_told_by_what_it_was_set_for(
    seconds_left: float, error: type[ClarifierError]
) -> None:
    async def ring_early() -> Message:
        raise TimeoutError

    request, account = Request({"type": "http", "headers": []}, ring_early), Account(ByteBudget(LIMIT))
    with pytest.raises(error):
        asyncio.run(_read(request, account, LIMIT, timeout_s=10.0, deadline=time.monotonic() + seconds_left))


def test_row_4_a_body_that_stops_coming_is_408_and_holds_no_place(small: Running) -> None:
    head = "POST /classify HTTP/1.1\nHost: h\nContent-Type: image/png\nContent-Length: 5000\n\n"
    answer, seconds = raw_exchange(small.port, head, b"only this")
    status, problem = problem_in(answer)
    assert (status, problem["code"]) == (408, "body_too_slow")
    assert b"connection: close" in answer.lower()
    assert 0.9 < seconds < 10
    assert small.metric("clarifier_queue_depth") == 0
    assert small.still_answers()


def test_row_8_an_encoded_body_is_415_and_not_inflated(service: Running) -> None:
    for coding, body in [("gzip", gzip.compress(GOOD)), ("br", GOOD), ("unknown", GOOD)]:
        response = service.client.post("/classify", content=body, headers={"content-encoding": coding})
        service.refuses(response, 415, "unsupported_media")
    assert service.client.post("/classify", content=GOOD, headers={"content-encoding": "identity"}).is_success


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("multipart/form-data", form(part("image", GOOD))),
        ("multipart/form-data; boundary=", form(part("image", GOOD))),
        ("multipart/form-data; boundary=wrong", form(part("image", GOOD))),
        (f"multipart/form-data; boundary={'x' * 300}", form(part("image", GOOD))),
        (MULTIPART["content-type"], part("image", GOOD)),
        (MULTIPART["content-type"], form(part("image", GOOD))[:60]),
        (MULTIPART["content-type"], b"--b0undary\r\nno colon here\r\n\r\nx\r\n--b0undary--\r\n"),
        (MULTIPART["content-type"], b"--b0undary\r\nContent-Type: image/png\r\n\r\nx\r\n--b0undary--\r\n"),
        (MULTIPART["content-type"], b"garbage"),
    ],
    ids=["none", "blank", "wrong", "long", "not closed", "truncated", "bad header", "no name", "garbage"],
)
def test_row_15_malformed_multipart_is_400(service: Running, header: str, body: bytes) -> None:
    response = service.client.post("/classify", content=body, headers={"content-type": header})
    service.refuses(response, 400, "malformed_multipart")


def test_row_15_a_nested_multipart_is_400(service: Running) -> None:
    inner = form(part("image", GOOD)).replace(BOUNDARY.encode(), b"inner")
    nested = form(part("image", inner, headers=b"Content-Type: multipart/mixed; boundary=inner\r\n"))
    response = service.client.post("/classify", content=nested, headers=MULTIPART)
    service.refuses(response, 400, "malformed_multipart")


@pytest.mark.parametrize(
    "body",
    [
        form(*[part("image", GOOD)] * 10_000),
        form(*[part(f"f{i}", b"", file_name=None) for i in range(10_000)]),
        form(part("image", GOOD, headers=b"X-A: 1\r\n" * 1000)),
        form(part("image", GOOD, headers=b"X-A: " + b"a" * 100_000 + b"\r\n")),
        b"x" * 5_000_000 + b"\r\n" + form(part("image", GOOD)),
        form(part("image", GOOD)) + b"\r\n" * 2_000_000,
    ],
    ids=["10000 images", "10000 fields", "1000 headers", "long header", "preamble", "epilogue"],
)
def test_row_16_multipart_bombs_are_400_and_cost_little(service: Running, body: bytes) -> None:
    started = time.process_time()
    response = service.client.post("/classify", content=body, headers=MULTIPART)
    assert time.process_time() - started < 1  # seconds of CPU, of client and server together
    service.refuses(response, 400, "malformed_multipart")


def test_a_short_epilogue_is_not_looked_at(service: Running) -> None:
    body = form(part("image", GOOD)) + b"\r\nfarewell"
    assert service.client.post("/classify", content=body, headers=MULTIPART).status_code == 200


def test_row_17_image_as_a_text_field_is_400(service: Running) -> None:
    body = form(part("image", bytes(9 * 2**20), file_name=None))
    response = service.client.post("/classify", content=body, headers=MULTIPART)
    problem = service.refuses(response, 400, "malformed_multipart")
    assert "file" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (form(part("image", GOOD), part("image", GOOD)), "image"),
        (form(part("file", GOOD)), "file"),
        (form(part("im age<>", GOOD)), "im?age??"),
        (form(part("image", b"")), "image"),
        (form(part("image", GOOD), part("model", b"cifar10", file_name=None)), "model"),
    ],
    ids=["two", "misspelt", "unprintable", "empty", "another"],
)
def test_row_18_wrong_fields_are_422_and_named(service: Running, body: bytes, field: str) -> None:
    problem = service.refuses(service.client.post("/classify", content=body, headers=MULTIPART), 422, "wrong_field")
    assert [error["pointer"] for error in problem["errors"]] == [f"#/form/{field}"]
    assert "image" in problem["detail"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "n" * 4096, "\N{CAT FACE}.png", "a\0b.png", "<b>a.png</b>", ""])
def test_row_19_file_names_are_ignored_and_never_seen_again(
    service: Running, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    body = form(part("image", GOOD, file_name=name))
    response = service.client.post("/classify", content=body, headers=MULTIPART)
    assert response.json()["label"] == "green"
    if name:
        assert name not in response.text
        assert name not in caplog.text


PNG_TYPE = b"Content-Type: image/png\r\n"


@pytest.mark.parametrize(
    ("body", "declared"),
    [
        (encoded(green(), "JPEG"), "image/png"),
        (
            form(part("image", encoded(green(), "JPEG"), headers=b"Content-Type: image/png\r\n")),
            MULTIPART["content-type"],
        ),
    ],
    ids=["raw", "multipart"],
)
def test_row_24_the_detected_format_wins_over_the_declared_one_and_is_counted(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture, body: bytes, declared: str
) -> None:
    caplog.set_level("INFO")
    service = start()
    response = service.client.post("/classify", content=body, headers={"content-type": declared})
    assert response.json()["label"] == "green"
    assert service.still_answers()  # a PNG that is declared as nothing
    assert service.client.post("/classify", content=GOOD, headers={"content-type": "image/png"}).is_success
    alias = {"content-type": "image/jpg"}
    assert service.client.post("/classify", content=encoded(green(), "JPEG"), headers=alias).is_success
    until(lambda: service.metric("clarifier_request_duration_seconds_count", route="/classify") == 4)
    assert service.metric("clarifier_mislabeled_total") == 1
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "service.requests"]
    assert lines[0]["format"] == "jpeg"


@pytest.mark.parametrize("kind", ["text/plain", "image/gif", "application/json", "multipart/mixed; boundary=x"])
def test_row_24_a_declared_type_that_is_not_ours_is_415(service: Running, kind: str) -> None:
    response = service.client.post("/classify", content=GOOD, headers={"content-type": kind})
    service.refuses(response, 415, "unsupported_media")
    assert "image/png" in response.headers["accept-post"]


@pytest.mark.parametrize(("kind", "status"), [("text/plain", 415), ("application/pdf", 415), ("image/heic", 200)])
def test_row_24_a_part_that_is_declared_to_be_no_image_is_415(service: Running, kind: str, status: int) -> None:
    response = service.client.post("/classify", files={"image": ("x", GOOD, kind)})
    if status == 415:
        service.refuses(response, 415, "unsupported_media")
    else:
        assert response.json()["label"] == "green"


def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted_as_499(start: Callable[..., Running]) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 500\r\n\r\nabc")
        time.sleep(0.05)
    assert server.still_answers()
    labels = {"route": "/classify", "model": "colors@1", "defense": "atop", "status": "499"}
    until(lambda: server.metric("clarifier_requests_total", **labels) == 1)


NEAR_MISSES = b"\r\n--b0undar" * (9 * 2**20 // 11)


def test_row_16_a_body_full_of_near_boundaries_costs_little(service: Running) -> None:
    started = time.process_time()
    response = service.client.post("/classify", content=form(part("image", NEAR_MISSES)), headers=MULTIPART)
    assert time.process_time() - started < 3
    service.refuses(response, 415, "unsupported_format")
    cut = service.client.post("/classify", content=part("image", NEAR_MISSES), headers=MULTIPART)
    service.refuses(cut, 400, "malformed_multipart")


def test_content_that_looks_like_framing_is_kept_whole() -> None:
    content = b"\r\n\r\n--\r\n--b0undar\r\n" + GOOD + b"\r\n--"
    (kept,) = _images_of(form(part("image", content)), BOUNDARY.encode(), "image", 1, LIMIT)
    assert isinstance(kept, Upload)
    assert kept.data == content
    several = form(part("images", b"1"), part("images", b""), part("images", b"\r\n"))
    uploads = _images_of(several, BOUNDARY.encode(), "images", 3, LIMIT)
    assert uploads == [Upload(b"1", ""), Upload(b"", ""), Upload(b"\r\n", "")]


def test_uploads_beyond_the_budget_are_429_and_give_back_what_they_held(start: Callable[..., Running]) -> None:
    server = start()
    budget = server.gateway.uploads
    budget.held += budget.limit - 100  # what others hold
    assert len(GOOD) < 100
    assert server.client.post("/classify", content=GOOD).status_code == 200
    large = server.client.post("/classify", content=GOOD + bytes(1000))
    assert large.headers["retry-after"]
    server.refuses(large, 429, "queue_full")
    assert budget.held == budget.limit - 100


def test_the_budget_has_room_for_a_batch_whatever_the_limits() -> None:
    assert budget_bytes(32, 10 * 2**20) == 64 * 10 * 2**20
    assert budget_bytes(1024, 1024) == 2 * batch_body_bytes(1024, 1024)


def test_headers_with_very_many_options_are_refused(service: Running) -> None:
    many = ";" * (MAX_OPTIONS + 1)
    head = {"content-type": f"image/png{many}"}
    service.refuses(service.client.post("/classify", content=GOOD, headers=head), 415, "unsupported_media")
    body = form(part("image", GOOD, headers=f"X-Any: a{many}\r\n".encode()))
    service.refuses(service.client.post("/classify", content=body, headers=MULTIPART), 400, "malformed_multipart")
