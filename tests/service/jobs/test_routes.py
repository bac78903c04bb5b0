"""Jobs over HTTP, between a gateway, workers without a network and a real Redis."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import httpx
import numpy as np
import pytest
from PIL import Image

from service.errors import Overloaded
from service.jobs.store import JOBS
from tests.service import own_redis
from tests.service.conftest import Running, Server, until
from tests.service.fakes import batch, png
from tests.service.farm import GOOD, Farm, ready
from tests.service.test_keys import entry
from tests.service.watch.test_similarity import scene, square_attack

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)


def post(server: Server, *images: bytes, query: str = "", **headers: str) -> httpx.Response:
    return server.client.post(f"/jobs{query}", files=batch(*images), headers=headers)


def post_zip(server: Server, data: bytes, query: str = "", **headers: str) -> httpx.Response:
    return server.client.post(f"/jobs{query}", content=data, headers={"Content-Type": "application/zip", **headers})


def zipped(files: dict[str, bytes], method: int = ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def done(server: Server, made: httpx.Response) -> dict[str, Any]:
    """What the job says of itself once it is done."""
    assert made.status_code == 202, made.text
    place = made.headers["location"]

    def state() -> dict[str, Any]:
        answer = server.client.get(place)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    until(lambda: state()["state"] == "done", 60)
    return state()


def lines(server: Server, made: httpx.Response) -> list[dict[str, Any]]:
    done(server, made)
    answer = server.client.get(made.headers["location"] + "/result")
    assert answer.headers["content-type"] == "application/jsonl"
    return [json.loads(line) for line in answer.text.splitlines()]


def color(number: int) -> bytes:
    """Red, green, blue, red, ..."""
    pixels = np.full((8, 8, 3), 20, np.uint8)
    pixels[..., number % 3] = 200
    return png(pixels)


def test_a_job_classifies_each_image_in_its_place(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    made = post(server, *(color(i) for i in range(70)), query="?defense=atop&seed=5&top_k=2")
    assert made.status_code == 202
    job = made.json()
    assert made.headers["location"] == f"/jobs/{job['id']}"
    assert (job["operation"], job["model"], job["defense"], job["images"]) == ("classify", "colors@1", "atop", 70)
    state = done(server, made)
    assert (state["done"], state["failed"]) == (70, 0)
    answers = lines(server, made)
    assert [answer["label"] for answer in answers] == [("red", "green", "blue")[i % 3] for i in range(70)]
    assert {answer["seed"] for answer in answers} == {5}
    assert {len(answer["top"]) for answer in answers} == {2}
    at_once = server.client.post("/classify/batch?defense=atop&seed=5&top_k=2", files=batch(color(0)))
    expected = at_once.json()["results"][0]
    assert answers[0].keys() == expected.keys()
    same = expected.keys() - {"request_id", "timing_ms"}
    assert {name: answers[0][name] for name in same} == {name: expected[name] for name in same}
    assert farm.redis.client().zcard(JOBS) == 0
    assert farm.redis.client().exists(f"clarifier:job:{job['id']}:inputs") == 0


def test_a_bad_image_fails_alone_in_its_place(shared: tuple[Farm, Server]) -> None:
    _, server = shared
    failed_before = server.metric("clarifier_job_images_total", outcome="failed")
    made = post(server, GOOD, b"no image", b"", GOOD, query="?explain=true")
    answers = lines(server, made)
    assert [answer.get("code") for answer in answers] == [None, "unsupported_format", "unsupported_format", None]
    assert done(server, made)["failed"] == 2
    assert answers[3]["undefended"]["label"] == "green"
    assert server.metric("clarifier_job_images_total", outcome="failed") == failed_before + 2
    none_good = post(server, b"no image")
    assert [answer["status"] for answer in lines(server, none_good)] == [415]


def test_drawn_seeds_differ_and_stay(shared: tuple[Farm, Server]) -> None:
    _, server = shared
    made = post(server, *[GOOD] * 3)
    seeds = [answer["seed"] for answer in lines(server, made)]
    assert len(set(seeds)) == 3
    assert [answer["seed"] for answer in lines(server, made)] == seeds


@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_a_zip_purifies_to_a_zip(shared: tuple[Farm, Server], method: int) -> None:
    _, server = shared
    files = {"a/": b"", "a/one.png": color(0), "../../etc/two": color(1), "__MACOSX/._one.png": b"x", "bad": b"bad"}
    made = post_zip(server, zipped(files, method), "?operation=purify&seed=3")
    assert done(server, made)["operation"] == "purify"
    answer = server.client.get(made.headers["location"] + "/result")
    assert answer.headers["content-type"] == "application/zip"
    with ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["0.png", "1.png", "2.json", "results.json"]
        with Image.open(io.BytesIO(archive.read("1.png"))) as picture:
            assert np.asarray(picture)[0, 0].tolist() == [20, 200, 20]
        listed = json.loads(archive.read("results.json"))
        assert json.loads(archive.read("2.json"))["code"] == "unsupported_format"
    assert [each.get("file") for each in listed["results"]] == ["0.png", "1.png", None]
    assert listed["results"][0]["seed"] == 3
    at_once = server.client.post("/purify/batch?seed=3", files=batch(color(0), color(1), b"bad"))
    with ZipFile(io.BytesIO(at_once.content)) as archive:
        expected = json.loads(archive.read("results.json"))
    for each in (*listed["results"], *expected["results"]):
        each.pop("request_id", None)
    assert {**listed, "request_id": ""} == {**expected, "request_id": ""}


def test_a_result_is_409_until_the_job_is_done_and_cancelled_work_leaves_the_queue(farm: Farm) -> None:
    server = farm.gateway()
    worker = farm.worker(max_batch_size=1, delay_s=1.0)
    ready(server)
    made = post(server, *[GOOD] * 100)
    place = made.headers["location"]
    refused = server.client.get(place + "/result")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_unfinished")
    assert int(refused.headers["retry-after"]) >= 1
    until(lambda: server.client.get(place).json()["state"] == "running")
    until(lambda: farm.waiting() > 0)
    until(lambda: server.metric("clarifier_jobs") == 1)
    assert server.client.delete(place).status_code == 204
    for path in (place, place + "/result"):
        gone = server.client.get(path)
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_job")
    assert server.client.delete(place).status_code == 404  # twice is harmless
    until(lambda: farm.waiting() <= 1)  # what runs
    until(lambda: farm.waiting() == 0)
    assert [key for key in farm.redis.client().keys("clarifier:job*")] == []
    until(lambda: server.metric("clarifier_jobs") == 0)
    worker.kill()


def test_row_57_what_is_no_job_is_404(shared: tuple[Farm, Server]) -> None:
    _, server = shared
    for name in ("0" * 32, "x", "0" * 5000, "..%2f..", "%00", "workers"):
        answer = server.client.get(f"/jobs/{name}")
        assert answer.status_code == 404, name
        assert server.client.delete(f"/jobs/{name}").status_code == 404


def test_row_57_a_job_expires(farm: Farm) -> None:
    server = farm.gateway(job_ttl_s=2)
    farm.worker()
    ready(server)
    made = post(server, GOOD)
    done(server, made)
    until(lambda: server.client.get(made.headers["location"]).status_code == 404)
    assert farm.redis.client().keys("clarifier:job*") == []


def test_an_idempotency_key_makes_one_job(shared: tuple[Farm, Server]) -> None:
    farm, server = shared
    key = {"Idempotency-Key": "monday"}
    first = post(server, GOOD, color(0), **key)
    again = post(server, GOOD, color(0), **key)  # another boundary: another body, the same job
    assert first.json()["id"] == again.json()["id"]
    others = [post(server, GOOD, color(1), **key), post(server, GOOD, color(0), query="?votes=2", **key)]
    assert [(other.status_code, other.json()["code"]) for other in others] == [(409, "idempotency_key_reused")] * 2
    assert post(server, GOOD, color(0), **{"Idempotency-Key": "tuesday"}).json()["id"] != first.json()["id"]
    bad = post(server, GOOD, **{"Idempotency-Key": "a b"})
    assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (422, "#/header/Idempotency-Key")
    done(server, first)
    assert server.client.delete(first.headers["location"]).status_code == 204
    anew = post(server, GOOD, color(1), **key)  # the job of that key is gone
    assert anew.status_code == 202
    done(server, anew)
    redis: Any = farm.redis.client()
    ids = {key.split(b":")[2] for key in redis.keys("clarifier:job:*")}
    kept = {job for job in ids if redis.exists(b"clarifier:job:" + job)}
    assert ids == kept  # nothing is left of uploads that made no job


def test_row_84_near_duplicates_in_jobs_are_alerts(farm: Farm) -> None:
    server = farm.gateway(similarity_limit=10)
    farm.worker()
    ready(server)
    queries = [png(query) for query in square_attack(scene(1, 8), 40)]
    assert post(server, *queries[:20], b"no image").status_code == 202
    assert post_zip(server, zipped({str(i): query for i, query in enumerate(queries[20:])})).status_code == 202
    until(lambda: server.metric("clarifier_query_similarity_alerts_total") > 10)
    assert server.metric("clarifier_query_similarity_alerts_total") <= 30


def test_limits_are_refused(farm: Farm) -> None:
    server = farm.gateway(max_job_images=3, max_job_bytes=20_000, max_image_bytes=2000, max_jobs=1)
    ready_without_images = post(server, GOOD)
    assert ready_without_images.status_code == 503  # no worker has come yet
    farm.worker(max_batch_size=1)
    ready(server)
    for response, status, code in (
        (post(server, *[GOOD] * 4), 413, "too_many_images"),
        (post_zip(server, zipped({str(i): GOOD for i in range(4)})), 413, "too_many_images"),
        (post(server, *[b"x" * 1999] * 11), 413, "body_too_large"),
        (server.client.post("/jobs", content=(b"x" for _ in range(20_001))), 415, "unsupported_media"),
        (server.client.post("/jobs", headers={"Content-Type": "application/zip"}), 400, "empty_body"),
        (post_zip(server, zipped({})), 422, "wrong_field"),
        (post_zip(server, b"x" * 100), 400, "malformed_zip"),
        (post_zip(server, zipped({"a": GOOD})[:-60]), 400, "malformed_zip"),
        (server.client.post("/jobs", files=[("image", ("a", GOOD))]), 422, "wrong_field"),
        (post(server, GOOD, query="?operation=detect"), 422, "invalid_parameter"),
        (post(server, GOOD, query="?operation=purify&size=original"), 422, "invalid_parameter"),
        (post(server, GOOD, query="?top_k=4"), 422, "invalid_parameter"),
        (post(server, GOOD, query="?model=other"), 404, "unknown_model"),
    ):
        assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert farm.redis.client().keys("clarifier:job*") == []  # nothing is left of any
    too_large = post(server, GOOD, b"x" * 2001, GOOD)
    assert [answer.get("code") for answer in lines(server, too_large)] == [None, "body_too_large", None]
    bomb = post_zip(server, zipped({"a": GOOD, "b": bytes(10_000_000), "c": GOOD}))
    assert [answer.get("code") for answer in lines(server, bomb)] == [None, "body_too_large", None]
    nested = post_zip(server, zipped({"a": zipped({"b": GOOD}), "c": GOOD}))
    assert [answer.get("code") for answer in lines(server, nested)] == ["unsupported_format", None]


def test_so_many_jobs_may_wait(farm: Farm) -> None:
    server = farm.gateway(max_jobs=1)
    farm.worker(max_batch_size=1, delay_s=1.0)
    ready(server)
    slow = post(server, *[GOOD] * 100)
    full = post(server, GOOD)
    assert (slow.status_code, full.status_code, full.json()["code"]) == (202, 429, "queue_full")
    assert "retry-after" in full.headers


def test_a_job_belongs_to_the_key_that_made_it(farm: Farm, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        entry("batcher", "key-for-jobs", 'rights = ["jobs"]', 'rate_limit = "40/minute"')
        + entry("other", "other-key-for-jobs", 'rights = ["jobs"]')
        + entry("plain", "key-without-rights")
    )
    server = farm.gateway(api_keys_file=keys)
    farm.worker()
    ready(server)
    mine, other, plain = ({"X-API-Key": key} for key in ("key-for-jobs", "other-key-for-jobs", "key-without-rights"))
    assert post(server, GOOD).status_code == 401
    refused = post(server, GOOD, **plain)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert post(server, GOOD, query="?explain=true", **mine).status_code == 403
    assert post(server, GOOD, query="?defense=zeropur", **mine).status_code == 403
    made = post(server, *[GOOD] * 20, **mine)
    place = made.headers["location"]
    assert server.client.get(place, headers=mine).status_code == 200
    for method in ("GET", "DELETE"):
        assert server.client.request(method, place, headers=other).json()["code"] == "unknown_job"
        assert server.client.request(method, place).status_code == 401
    refused = post(server, *[GOOD] * 41, **mine)
    assert (refused.status_code, refused.json()["code"]) == (413, "too_many_images")
    refused = post(server, *[GOOD] * 25, **mine)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")


def test_in_memory_mode_it_says_what_jobs_need(start: Callable[..., Running]) -> None:
    server = start()
    for method, path in (("POST", "/jobs"), ("GET", "/jobs/" + "0" * 32), ("DELETE", "/jobs/" + "0" * 32)):
        answer = server.client.request(method, path, files=batch(GOOD) if method == "POST" else None)
        assert "CLARIFIER_QUEUE=redis" in server.refuses(answer, 404, "no_jobs")["detail"]


def test_the_commands_of_the_documentation_work(shared: tuple[Farm, Server], tmp_path: Path) -> None:
    _, server = shared
    (tmp_path / "photos.zip").write_bytes(zipped({"cat.jpg": (ROOT / "examples/cat.jpg").read_bytes()}))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    section = (ROOT / "service/README.md").read_text().partition("\n## Jobs\n")[2]
    commands = [line for line in section.partition("```sh\n")[2].partition("```")[0].splitlines() if "curl" in line]
    assert len(commands) == 5
    place = ""
    for command in commands:
        line = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("/jobs/ID", place)
        ran = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        if " -i " in line:
            assert "202 Accepted" in ran.stdout
            place = re.findall("location: (\\S+)", ran.stdout)[0]
            until(lambda place=place: server.client.get(place).json()["state"] == "done", 60)  # type: ignore[misc]
    with ZipFile(tmp_path / "result") as archive:
        assert archive.namelist() == ["0.png", "1.png", "results.json"]
    assert server.client.get(place).status_code == 404


def test_they_are_documented(shared: tuple[Farm, Server]) -> None:
    _, server = shared
    described = server.client.get("/openapi.json").json()
    paths = described["paths"]
    made = paths["/jobs"]["post"]
    assert set(made["requestBody"]["content"]) == {"multipart/form-data", "application/zip"}
    assert {each["name"] for each in made["parameters"]} >= {"operation", "defense", "seed", "Idempotency-Key"}
    assert made["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/JobResponse")
    assert "Location" in made["responses"]["202"]["headers"]
    assert set(paths["/jobs/{id}"]) == {"get", "delete"}
    assert set(paths["/jobs/{id}/result"]["get"]["responses"]["200"]["content"]) == {
        "application/jsonl",
        "application/zip",
    }


def test_a_job_is_taken_however_long_others_have_to_wait(
    shared: tuple[Farm, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = shared

    def refuse(*_: object) -> None:
        raise Overloaded

    monkeypatch.setattr(server.gateway.batcher, "check_in_time", refuse)
    assert server.client.post("/classify", content=GOOD).status_code == 429
    assert done(server, post(server, GOOD))["state"] == "done"
