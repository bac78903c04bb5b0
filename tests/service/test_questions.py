"""Deadlines, full queues, and clients who leave: what happens to a request between its arrival and its answer."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from service import answering
from service.app import decoder_threads
from service.cache import answer_keys
from service.dispatch import Places
from service.questions import Question
from service.uploads import QUICK_FORM_BYTES
from service.work import Answer, Classified, Floats, Key
from tests.service.conftest import Running, until
from tests.service.fakes import NAN_VALUE, POISON_VALUE, batch, green, marked, png

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
    assert _what_became(server) == {"accepted": 3, "answered": 2, "cancelled": 1}


def test_row_11_a_client_that_leaves_is_seen_behind_a_large_upload(start: Callable[..., Running]) -> None:
    server = start()
    large = png(np.random.default_rng(0).integers(0, 256, (170, 170, 3), dtype=np.uint8))
    with ThreadPoolExecutor(1) as clients:
        held = hold(server, clients)
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(f"POST {URL} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(large)}\r\n\r\n".encode())
            until(lambda: len(server.gateway._in_flight) == 2)
            leaving.sendall(large)
            until(lambda: server.metric("clarifier_queue_depth") == 1)
        until(lambda: server.metric("clarifier_queue_depth") == 0)
        server.bundle.gate.set()
        assert held.result().status_code == 200
    assert _what_became(server) == {"accepted": 2, "answered": 1, "cancelled": 1}


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
    became = _what_became(server)
    assert became["answered"] >= 60
    assert became["accepted"] == became["answered"] + became["cancelled"]
    assert server.still_answers()


def _what_became(server: Running) -> dict[str, float]:
    where = (server.metric("clarifier_cancelled_total", where=where) for where in ("queue", "sent", "running"))
    return {
        "accepted": server.metric("clarifier_accepted_total"),
        "answered": server.metric("clarifier_answered_total"),
        "cancelled": sum(where),
    }


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


# --- answers that are known already


def cached(server: Running) -> dict[str, float]:
    """How many images were hits, misses, skipped."""
    return {
        result: count
        for result in ("hit", "miss", "skip")
        if (count := server.metric("clarifier_cache_requests_total", result=result))
    }


def without_its_own(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what belongs to its request."""
    return {name: value for name, value in answer.items() if name not in ("request_id", "timing_ms")}


@pytest.mark.parametrize(
    "url",
    [
        "/classify?defense=none&seed=1",
        "/classify?seed=7&votes=3&explain=true",
        "/classify?defense=atop,aid&seed=0",
        "/detect",
    ],
)
def test_an_image_that_comes_again_has_the_same_answer_without_the_engine(
    start: Callable[..., Running], url: str
) -> None:
    server = start(cache_ttl_s=60.0)
    first = server.client.post(url, content=GOOD).json()
    ran = list(server.bundle.batches)
    again = server.client.post(url, content=GOOD).json()
    assert server.bundle.batches == ran != []
    assert without_its_own(again) == without_its_own(first)
    assert again["request_id"] != first["request_id"]
    assert (again["timing_ms"]["queue"], again["timing_ms"]["inference"]) == (0, 0)
    assert again["timing_ms"]["total"] >= again["timing_ms"]["decode"] > 0
    assert first["timing_ms"]["inference"] > 0
    assert cached(server) == {"hit": 1, "miss": 1}
    until(lambda: server.metric("clarifier_stage_duration_seconds_count", stage="decode") == 2)
    assert server.metric("clarifier_stage_duration_seconds_count", stage="queue") == 1


def test_a_purified_image_is_known_at_every_size_and_type(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    first = server.client.post("/purify?seed=1", content=GOOD)
    again = server.client.post("/purify?seed=1", content=GOOD)
    assert again.content == first.content
    assert again.headers["x-clarifier-linf"] == first.headers["x-clarifier-linf"]
    floats = server.client.post("/purify?seed=1&size=model", content=GOOD, headers={"accept": "application/x-npy"})
    assert floats.headers["content-type"] == "application/x-npy"
    assert server.client.post("/purify?seed=1&size=original", content=GOOD).status_code == 200
    assert server.bundle.batches == [1]
    assert cached(server) == {"hit": 3, "miss": 1}


def test_what_is_drawn_afresh_is_never_known(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    for route in ("/classify", "/classify", "/purify?defense=aid,atop", "/purify?defense=aid,atop"):
        assert server.client.post(route, content=GOOD).status_code == 200
    tops = [server.client.post("/classify", content=GOOD).json()["top"] for _ in range(2)]
    assert tops[0] != tops[1]
    assert cached(server) == {"skip": 6}
    assert server.client.post("/classify?seed=1", content=GOOD).status_code == 200
    assert cached(server) == {"skip": 6, "miss": 1}


def test_where_nothing_is_drawn_the_seed_does_not_matter_and_is_the_requests_own(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    urls = [
        f"/classify?defense={defense}{seed}" for defense in ("aid", "aid:code") for seed in ("&seed=1", "&seed=2", "")
    ]
    answers = [server.client.post(url, content=GOOD).json() for url in urls]
    assert cached(server) == {"miss": 1, "hit": 5}
    assert [answer["seed"] for answer in answers[:2]] == [1, 2]
    assert len({answer["seed"] for answer in answers[2::3]}) == 2
    assert [answer["top"] for answer in answers] == [answers[0]["top"]] * 6


def test_a_question_that_differs_is_another_question(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    other = green()
    other[4, 4, 2] += 1
    asked = [
        ("/classify?seed=1", GOOD),
        ("/classify?seed=2", GOOD),
        ("/classify?seed=1&votes=2", GOOD),
        ("/classify?seed=1&explain=true", GOOD),
        ("/classify?seed=1&defense=atop:rt1", GOOD),
        ("/classify?defense=none", GOOD),
        ("/purify?seed=1", GOOD),
        ("/detect", GOOD),
        ("/classify?seed=1", png(other)),
    ]
    for url, image in asked:
        assert server.client.post(url, content=image).status_code == 200
    assert cached(server) == {"miss": len(asked)}
    tops = [len(server.client.post(f"/classify?seed=1&top_k={k}", content=GOOD).json()["top"]) for k in (1, 2, 3)]
    assert tops == [1, 2, 3]
    assert cached(server) == {"miss": len(asked), "hit": 3}


def test_in_a_batch_only_the_new_images_run_and_all_are_in_their_places(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    colors = [png(np.roll(green(), turn, 2)) for turn in (0, 1, 2)]
    labels = ["green", "blue", "red"]
    assert server.client.post(URL, content=colors[1]).json()["label"] == "blue"
    server.bundle.batches.clear()
    files = batch(colors[0], b"no image", colors[1], colors[2], colors[1])
    results = server.client.post("/classify/batch?defense=none", files=files).json()["results"]
    assert [result.get("label", result.get("code")) for result in results] == [
        "green", "unsupported_format", "blue", "red", "blue",
    ]  # fmt: skip
    assert [result["timing_ms"]["inference"] == 0 for result in results if "label" in result] == [
        False,
        True,
        False,
        True,
    ]
    assert server.bundle.batches == [2]
    assert cached(server) == {"miss": 3, "hit": 2}
    again = server.client.post("/classify/batch?defense=none", files=batch(*colors)).json()["results"]
    assert [result["label"] for result in again] == labels
    assert server.bundle.batches == [2]


def test_errors_and_answers_that_are_not_finite_are_not_kept(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    for value, code in ((NAN_VALUE, "nan"), (POISON_VALUE, "inference_failed")):
        image = png(marked(value))
        answers = [server.client.post(URL, content=image) for _ in range(2)]
        assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(500, code)] * 2
    assert server.bundle.batches == [1] * 4
    assert cached(server) == {"miss": 4}


def test_a_known_answer_is_counted_as_any_other(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0)
    for _ in range(3):
        assert server.client.post(URL + "&explain=true", content=GOOD).status_code == 200
    assert server.metric("clarifier_predictions_total", model="colors@1", label="green") == 3
    assert server.metric("clarifier_aid_score_count") == 3
    assert server.metric("clarifier_suspicious_total", model="colors@1") == 3
    assert server.metric("clarifier_batch_size_count") == 1
    labels = {"route": "/classify", "model": "colors@1", "defense": "none", "status": "200"}
    until(lambda: server.metric("clarifier_requests_total", **labels) == 3)


def test_an_answer_is_forgotten_in_time(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=0.1)
    assert server.client.post(URL, content=GOOD).status_code == 200
    time.sleep(0.11)
    assert server.client.post(URL, content=GOOD).status_code == 200
    assert cached(server) == {"miss": 2}


def test_without_a_cache_nothing_is_kept_or_counted(start: Callable[..., Running]) -> None:
    server = start()
    for _ in range(2):
        assert server.client.post(URL, content=GOOD).status_code == 200
    assert server.bundle.batches == [1, 1]
    assert server.gateway.cache is None
    assert cached(server) == {}


class SlowCache:
    """Knows every image, after a while."""

    async def find(self, keys: Sequence[bytes]) -> list[Answer | None]:
        await asyncio.sleep(0.1)
        return [Classified(np.array([1, 0, 0], np.float32)) for _ in keys]

    async def keep(self, answers: Mapping[bytes, Answer]) -> None:
        raise AssertionError("nothing is new")


def test_a_known_answer_that_comes_too_late_is_504(start: Callable[..., Running]) -> None:
    server = start()
    server.gateway.cache = SlowCache()
    assert server.client.post(URL, content=GOOD).json()["label"] == "red"
    late = server.client.post(URL, content=GOOD, headers={"x-request-timeout-ms": "50"})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert server.bundle.batches == []


def test_a_known_image_gives_its_place_back_before_its_answer_is_made(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(cache_ttl_s=60.0)
    batcher = server.gateway.batcher
    assert batcher is not None
    assert server.client.post("/purify?seed=1", content=GOOD).status_code == 200
    reserved = list[int]()

    def encode(image: Floats, media_type: str) -> bytes:
        reserved.append(batcher._reserved)
        return b"picture"

    monkeypatch.setattr("service.images.encode_image", encode)
    assert server.client.post("/purify?seed=1", content=GOOD).content == b"picture"
    assert (reserved, server.bundle.batches) == ([0], [1])


def test_a_full_queue_refuses_known_images_too_and_then_answers_them(start: Callable[..., Running]) -> None:
    server = start(cache_ttl_s=60.0, max_queue_size=1, max_batch_size=1)
    assert server.client.post(URL, content=GOOD).status_code == 200
    other = "/classify?defense=aid"
    with ThreadPoolExecutor(4) as clients:
        server.bundle.gate.clear()
        server.bundle.entered.clear()
        held = clients.submit(server.client.post, other, content=GOOD)
        assert server.bundle.entered.wait(20)
        assert server.client.post(URL, content=GOOD).status_code == 200  # the engine is busy, and not asked
        waiting = clients.submit(server.client.post, other, content=GOOD)
        until(lambda: server.metric("clarifier_queue_depth") == 1)
        full = server.client.post(URL, content=GOOD)
        assert (full.status_code, full.json()["code"]) == (429, "queue_full")
        server.bundle.gate.set()
        assert (held.result().status_code, waiting.result().status_code) == (200, 200)


@pytest.mark.parametrize(("quick_bytes", "in_thread"), [(8 * 8 * 3, False), (8 * 8 * 3 - 1, True)])
def test_large_inputs_are_hashed_in_a_thread(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, quick_bytes: int, in_thread: bool
) -> None:
    server = start(cache_ttl_s=60.0)
    threads = list[str]()

    def watched(*arguments: Any) -> list[bytes]:
        threads.append(threading.current_thread().name)
        return answer_keys(*arguments)

    monkeypatch.setattr(answering, "answer_keys", watched)
    monkeypatch.setattr(answering, "QUICK_HASH_BYTES", quick_bytes)
    for _ in range(2):
        assert server.client.post(URL, content=GOOD).status_code == 200
    assert cached(server) == {"miss": 1, "hit": 1}
    assert [name.startswith("decoder") for name in threads] == [in_thread] * 2


def test_row_83_nothing_is_known_in_another_scope(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(cache_ttl_s=60.0)
    for scope in ("one", "another", "one"):
        monkeypatch.setattr(Question, "scope", scope)
        assert server.client.post(URL, content=GOOD).status_code == 200
    assert cached(server) == {"miss": 2, "hit": 1}
