"""Batches: each image's own answer, or its problem, in its place."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from zipfile import ZipFile

import httpx
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from service.errors import ClarifierError
from service.images import encode_image
from service.problems import problem_of
from service.schemas import Problem
from service.work import Floats
from tests.service.conftest import Running, until
from tests.service.fakes import NAN_VALUE, batch, encoded, green, marked, png
from tests.service.test_routes import ANSWER

GOOD = png(green())
BATCH_ROUTES = ["/classify/batch", "/purify/batch"]


@pytest.mark.parametrize("route", BATCH_ROUTES)
def test_row_51_a_batch_of_no_images_is_422(service: Running, route: str) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    response = service.client.post(route, content=b"--b--\r\n", headers=form)
    service.refuses(response, 422, "wrong_field")


@pytest.mark.parametrize("route", BATCH_ROUTES)
def test_row_51_a_batch_over_the_limit_is_413(service: Running, route: str) -> None:
    response = service.client.post(route, files=batch(*[GOOD] * 33))
    problem = service.refuses(response, 413, "too_many_images")
    assert problem["limit"] == 32
    assert service.client.post(route, files=batch(*[GOOD] * 32)).status_code == 200


def test_row_51_one_bad_image_among_32_fails_alone_and_in_its_place(service: Running) -> None:
    images = [GOOD] * 32
    images[7], images[20] = b"no image", png(marked(NAN_VALUE))
    response = service.client.post("/classify/batch?defense=none", files=batch(*images))
    assert response.status_code == 200
    results = response.json()["results"]
    assert len(results) == 32
    assert (results[7]["status"], results[7]["code"]) == (415, "unsupported_format")
    assert (results[20]["status"], results[20]["code"]) == (500, "nan")
    assert all(set(result) == ANSWER for i, result in enumerate(results) if i not in (7, 20))
    assert service.still_answers()


def test_row_51_a_batch_of_mixed_sizes_and_formats_is_answered_in_order(service: Running) -> None:
    red, blue = np.roll(green(20), 1, 2)[..., ::-1], np.roll(green(9), 1, 2)
    images = [encoded(green(50), "JPEG"), png(blue), encoded(red, "BMP"), png(green(8))]
    results = service.client.post("/classify/batch?defense=none&top_k=1", files=batch(*images)).json()["results"]
    assert [result["label"] for result in results] == ["green", "blue", "red", "green"]
    assert all(len(result["top"]) == 1 for result in results)


def test_a_bad_image_of_a_batch_is_not_kept_until_the_others_are_answered(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = list[ClarifierError]()

    def noted(error: ClarifierError, request_id: str) -> Problem:
        errors.append(error)
        return problem_of(error, request_id)

    monkeypatch.setattr("service.batch_answers.problem_of", noted)
    assert service.client.post("/classify/batch", files=batch(GOOD, GOOD[:-20])).json()["results"][1]["status"] == 422
    (error,) = errors
    assert [error.__traceback__, error.__cause__, error.__context__] == [None] * 3  # frames would hold its bytes


def test_a_batch_repeats_its_seed_for_each_image(service: Running) -> None:
    results = service.client.post("/classify/batch?seed=3", files=batch(GOOD, GOOD)).json()["results"]
    alone = service.client.post("/classify?seed=3", content=GOOD).json()
    assert [result["top"] for result in results] == [alone["top"]] * 2


@pytest.mark.parametrize("route", BATCH_ROUTES)
def test_a_raw_body_is_no_batch(service: Running, route: str) -> None:
    service.refuses(service.client.post(route, content=GOOD), 415, "unsupported_media")
    service.refuses(service.client.post(route), 400, "empty_body")


def test_row_51_an_image_that_is_too_large_or_declared_to_be_none_fails_in_its_place(
    start: Callable[..., Running],
) -> None:
    server = start(max_image_bytes=2048)
    parts = [
        ("images", ("x", data, kind))
        for data, kind in [
            (GOOD, "image/png"),
            (GOOD + bytes(2048), "image/png"),
            (GOOD, "text/plain"),
            (GOOD, "image/png"),
        ]
    ]
    results = server.client.post("/classify/batch", files=parts).json()["results"]
    assert [result.get("code", result.get("label")) for result in results] == [
        "green",
        "body_too_large",
        "unsupported_media",
        "green",
    ]
    assert [result.get("status") for result in results] == [None, 413, 415, None]
    assert server.metric("clarifier_rejected_total", reason="body_too_large") == 1


def test_each_image_of_a_batch_has_its_own_decoding_time(service: Running) -> None:
    images = batch(GOOD, png(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)))
    results = service.client.post("/classify/batch?defense=none", files=images).json()["results"]
    small, large = (result["timing_ms"]["decode"] for result in results)
    assert small != large


def test_problems_of_a_batchs_images_are_counted_one_by_one(start: Callable[..., Running]) -> None:
    server = start()
    response = server.client.post("/classify/batch", files=batch(b"no image", GOOD, b"nor this"))
    assert response.status_code == 200
    assert server.metric("clarifier_rejected_total", reason="unsupported_format") == 2


def test_a_batch_without_a_sound_image_never_reaches_the_queue(start: Callable[..., Running]) -> None:
    server = start()
    response = server.client.post("/classify/batch", files=batch(b"no image", b"nor this"))
    assert [result["code"] for result in response.json()["results"]] == ["unsupported_format"] * 2
    response = server.client.post("/purify/batch", files=batch(b"no image", b"nor this"))
    assert [result["code"] for result in unzipped(response)[1]["results"]] == ["unsupported_format"] * 2
    assert server.bundle.batches == []
    assert server.still_answers()


# --- zips of purified images


def unzipped(response: httpx.Response) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a zip but the last, which is `results.json`; and what that says."""
    assert (response.status_code, response.headers["content-type"]) == (200, "application/zip"), response.text
    with ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert list(files)[-1] == "results.json"
    return files, json.loads(files.pop("results.json"))


def noise(height: int, width: int) -> bytes:
    return png(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", ["model", "original"])
def test_a_zip_has_what_purify_makes_of_each_image(service: Running, size: str) -> None:
    images = [GOOD, encoded(green(50), "JPEG"), noise(60, 100)]
    query = f"defense=atop&seed=4&size={size}"
    response = service.client.post(f"/purify/batch?{query}", files=batch(*images))
    alone = [service.client.post(f"/purify?{query}", content=image) for image in images]
    files, listed = unzipped(response)
    assert files == {f"{i}.png": one.content for i, one in enumerate(alone)}
    assert listed["results"] == [
        {
            "status": 200,
            "file": f"{i}.png",
            "linf": float(one.headers["x-clarifier-linf"]),
            "seed": 4,
            "degraded": False,
        }
        for i, one in enumerate(alone)
    ]
    assert all(result["linf"] > 0 for result in listed["results"])
    assert listed["request_id"] == response.headers["x-request-id"]
    assert (listed["model"], listed["defense"], listed["digest"]) == ("colors@1", "atop", "d" * 64)
    assert response.headers["x-clarifier-model"] == "colors@1"
    assert response.headers["x-clarifier-defense"] == "atop"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_each_image_of_a_zip_has_a_seed_of_its_own_that_makes_it_again(service: Running) -> None:
    files, listed = unzipped(service.client.post("/purify/batch", files=batch(GOOD, GOOD)))
    seeds = [result["seed"] for result in listed["results"]]
    again = [service.client.post(f"/purify?seed={seed}", content=GOOD).content for seed in seeds]
    assert [files["0.png"], files["1.png"]] == again
    assert again[0] != again[1]


def test_row_51_one_bad_image_among_32_has_its_problem_in_its_place_in_the_zip(start: Callable[..., Running]) -> None:
    server = start()
    images = [GOOD] * 32
    images[7], images[20] = b"no image", png(marked(NAN_VALUE))
    files, listed = unzipped(server.client.post("/purify/batch?defense=none", files=batch(*images)))
    names = [f"{i}.json" if i in (7, 20) else f"{i}.png" for i in range(32)]
    assert list(files) == names
    assert [result["status"] for result in listed["results"]] == [
        415 if i == 7 else 500 if i == 20 else 200 for i in range(32)
    ]
    assert [json.loads(files[f"{i}.json"]) for i in (7, 20)] == [listed["results"][i] for i in (7, 20)]
    problem = listed["results"][7]
    assert (problem["code"], problem["type"]) == ("unsupported_format", "/problems/unsupported-format")
    assert problem["request_id"] == listed["request_id"]
    assert all((np.asarray(Image.open(io.BytesIO(files[name]))) == green()).all() for name in names if "png" in name)
    assert server.metric("clarifier_rejected_total", reason="unsupported_format") == 1
    until(lambda: server.metric("clarifier_stage_duration_seconds_count", stage="encode") == 1)
    assert server.still_answers()


@pytest.mark.parametrize("accept", ["image/png", "application/json", "application/zip;q=0"])
def test_a_batch_of_purified_images_is_a_zip_or_nothing(service: Running, accept: str) -> None:
    response = service.client.post("/purify/batch", files=batch(GOOD), headers={"accept": accept})
    assert "application/zip" in service.refuses(response, 406, "not_acceptable")["detail"]
    for good in ("application/zip", "application/*", "*/*", "image/png, application/zip;q=0.1"):
        assert service.client.post("/purify/batch", files=batch(GOOD), headers={"accept": good}).status_code == 200


def test_a_batch_at_its_own_size_has_no_more_pixels_than_its_answer_has_room_for(start: Callable[..., Running]) -> None:
    server = start(max_image_pixels=10_000)
    images = batch(*[noise(100, 99)] * 5)
    problem = server.refuses(server.client.post("/purify/batch?size=original", files=images), 413, "too_many_pixels")
    assert (problem["limit"], problem["actual"]) == (40_000, 49_500)
    assert server.bundle.batches == [1]  # the one that shows that the service still answers
    assert server.client.post("/purify/batch", files=images).status_code == 200
    assert server.client.post("/purify/batch?size=original", files=images[:4]).status_code == 200
    assert server.gateway.uploads.held == 0


def test_the_images_of_a_zip_count_as_memory_from_before_they_are_purified_on(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    budget = server.gateway.uploads
    form = batch(*[GOOD + bytes(2000)] * 2)  # larger than the zip
    needed = 2 * 8 * 8 * 3 * 5
    body = httpx.Request("POST", "http://h", files=form).read()
    budget.limit = len(body) + needed - 1
    server.refuses(server.client.post("/purify/batch", files=form), 429, "queue_full")
    assert server.bundle.batches == [1]
    budget.limit += 1
    held = list[int]()
    purify = server.bundle.purify

    def watched(*arguments: Any, **named: Any) -> Tensor:
        held.append(budget.held)
        return purify(*arguments, **named)

    monkeypatch.setattr(server.bundle, "purify", watched)
    response = server.client.post("/purify/batch", files=form)
    assert (response.status_code, held) == (200, [needed])
    assert budget.held == 0


def test_a_zip_that_outgrows_the_memory_for_answers_is_refused(start: Callable[..., Running]) -> None:
    server = start()
    budget = server.gateway.uploads
    photos = batch(*[encoded(np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8), "JPEG")] * 4)
    url = "/purify/batch?defense=none&size=original"
    body = len(httpx.Request("POST", "http://h", files=photos).read())
    budget.limit = body + 100_000  # of 120,000
    server.refuses(server.client.post(url, files=photos), 429, "queue_full")
    assert budget.held == 0
    budget.limit = body + 130_000
    assert server.client.post(url, files=photos).status_code == 200


def slow_encoder(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> list[int]:
    """Let `gate` hold each encoding; returns the list of those that have begun."""
    begun = list[int]()

    def encode(image: Floats, media_type: str) -> bytes:
        begun.append(len(begun))
        assert gate.wait(20)
        return encode_image(image, media_type)

    monkeypatch.setattr("service.images.encode_image", encode)
    return begun


def test_images_that_the_deadline_overtakes_are_problems_in_their_places(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    gate = threading.Event()
    begun = slow_encoder(monkeypatch, gate)
    with ThreadPoolExecutor(1) as clients:
        head = {"x-request-timeout-ms": "1000"}
        asked = clients.submit(server.client.post, "/purify/batch", files=batch(*[GOOD] * 3), headers=head)
        until(lambda: begun)
        time.sleep(1)
        gate.set()
        files, listed = unzipped(asked.result())
    assert begun == [0]
    assert list(files) == ["0.png", "1.json", "2.json"]
    assert [result["status"] for result in listed["results"]] == [200, 504, 504]
    assert server.metric("clarifier_rejected_total", reason="deadline_exceeded") == 2


def test_row_11_a_zip_is_not_made_to_the_end_for_a_client_that_has_left(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    gate = threading.Event()
    begun = slow_encoder(monkeypatch, gate)
    form = httpx.Request("POST", f"http://127.0.0.1:{server.port}/purify/batch", files=batch(*[GOOD] * 32))
    head = "".join(f"{name}: {value}\r\n" for name, value in form.headers.items())
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        leaving.sendall(f"POST /purify/batch HTTP/1.1\r\n{head}\r\n".encode() + form.read())
        until(lambda: begun)
    time.sleep(0.1)  # until the server has seen the end of the connection
    gate.set()
    labels = {"route": "/purify/batch", "model": "colors@1", "defense": "atop", "status": "499"}
    until(lambda: server.metric("clarifier_requests_total", **labels) == 1)
    assert begun == [0]
    assert server.gateway.uploads.held == 0
    assert server.still_answers()
