"""SIGHUP: what is new on disk is served, nobody's request fails, and what is bad changes nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from subprocess import Popen
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.gateway import Gateway
from service.settings import Settings
from tests.service import own_redis
from tests.service.conftest import until as until_within
from tests.service.fakes import green, png
from tests.service.farm import Farm, classify
from tests.service.shelf import (
    COLD,
    DAMAGED,
    HUGE,
    SLOW,
    Log,
    ShelfBundle,
    digest_of,
    hang_up,
    label_of,
    load_shelf,
    place,
    shelf_process,
)
from tests.service.test_keys import entry

GOOD = png(green())
KEPT = "what was served goes on"
UNCHANGED = "nothing has changed in the model repository"
LIMIT_S = 90.0
"""For what takes a moment where nothing else runs."""
until = partial(until_within, timeout_s=LIMIT_S)


# --- in this process


@dataclass
class Here:
    """An application around a repository of fakes."""

    root: Path
    made: httpx.AsyncClient
    gateway: Gateway
    happened: list[str]
    """What was loaded and warmed."""
    caplog: pytest.LogCaptureFixture

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def reload(self, says: str) -> None:
        """As SIGHUP does; back when the log says so."""
        self.caplog.clear()
        self.gateway.reload()
        await self.until(lambda: says in self.caplog.text)

    async def says(self, query: str = "") -> tuple[str, str]:
        """Label and digest of an answer."""
        answer = (await self.made.post(f"/classify?defense=none{query}", content=GOOD)).json()
        return answer["label"], answer["digest"]

    async def models(self) -> tuple[list[str], dict[str, str]]:
        """What is served, and what was refused."""
        listed = (await self.made.get("/models")).json()
        names = [f"{model['name']}@{model['version']}" for model in listed["models"]]
        return names, {refusal["bundle"]: refusal["reason"] for refusal in listed["refused"]}

    def metric(self, name: str, **labels: str) -> float | None:
        return self.gateway.metrics.registry.get_sample_value(name, labels)

    def bundle(self, name: str = "colors@1") -> ShelfBundle:
        found = self.gateway.catalog.bundles[name]
        assert isinstance(found, ShelfBundle)
        return found


@asynccontextmanager
async def here(root: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Here]:
    caplog.set_level(logging.INFO)
    happened = list[str]()
    app = create_app(
        Settings(model_repository=root, default_model="colors"), lambda settings: load_shelf(settings, happened)
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made,
    ):
        service = Here(root, made, app.state.gateway, happened, caplog)
        await service.until(lambda: service.gateway.batcher is not None)
        yield service


def run(root: Path, caplog: pytest.LogCaptureFixture, scenario: Callable[[Here], Awaitable[None]]) -> None:
    async def within() -> None:
        async with here(root, caplog) as service:
            await scenario(service)

    asyncio.run(within())


def test_who_was_let_in_before_is_answered_by_what_was_served_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = digest_of(place(tmp_path, 0))

    async def scenario(service: Here) -> None:
        old = service.bundle()
        old.gate.clear()
        running = asyncio.create_task(service.says())
        await service.until(old.entered.is_set)
        waiting = asyncio.create_task(service.says())
        rest = asyncio.Event()
        uploading = asyncio.create_task(service.made.post("/classify?defense=none", content=slowly(GOOD, rest)))
        await service.until(lambda: service.gateway.batcher is not None and service.gateway.batcher.depth == 1)
        after = digest_of(place(tmp_path, 1))
        await service.reload("from now on")
        await service.until(lambda: service.bundle() is not old)
        new = asyncio.create_task(service.says())
        await service.until(lambda: service.gateway.batcher is not None and service.gateway.batcher.depth == 2)
        old.gate.set()
        rest.set()
        assert [await running, await waiting, await new] == [(label_of(0), before)] * 2 + [(label_of(1), after)]
        answer = (await uploading).json()
        assert (answer["label"], answer["digest"]) == (label_of(0), before)
        assert service.metric("clarifier_model_info", model="colors@1", digest=after, device="cpu") == 1
        assert service.metric("clarifier_model_info", model="colors@1", digest=before, device="cpu") is None

    run(tmp_path, caplog, scenario)


async def slowly(image: bytes, rest: asyncio.Event) -> AsyncIterator[bytes]:
    yield image[:10]
    await rest.wait()
    yield image[10:]


def test_what_was_served_before_is_forgotten_when_nobody_needs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path, 0)

    async def scenario(service: Here) -> None:
        bundle = service.bundle()
        vars(bundle)["itself"] = bundle  # as networks are
        old, gate, entered = weakref.ref(bundle), bundle.gate, bundle.entered
        del bundle
        gate.clear()
        asked = asyncio.create_task(service.says())
        await service.until(entered.is_set)
        gc.freeze()  # as the process does
        place(tmp_path, 1)
        await service.reload("from now on")
        assert old() is not None
        gate.set()
        await asked
        await service.until(lambda: old() is None)
        assert (await service.says())[0] == label_of(1)

    try:
        run(tmp_path, caplog, scenario)
    finally:
        gc.unfreeze()


def test_only_what_is_new_is_loaded_and_warmed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path)

    async def scenario(service: Here) -> None:
        kept = service.bundle()
        assert service.happened == ["load colors@1", "warm colors@1"]
        digest = digest_of(place(tmp_path, 2, version="2"))
        await service.reload("from now on")
        await service.until(lambda: len(service.gateway.catalog.bundles) == 2)
        assert service.happened[2:] == ["load colors@2", "warm colors@2"]
        assert service.bundle() is kept
        assert await service.says() == (label_of(2), digest)
        assert (await service.says("&model=colors@1"))[0] == label_of(0)

    run(tmp_path, caplog, scenario)


def test_row_65_a_reload_of_what_is_served_already_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path)

    async def scenario(service: Here) -> None:
        catalog = service.gateway.catalog
        await service.reload(UNCHANGED)
        assert service.gateway.catalog is catalog
        assert service.happened == ["load colors@1", "warm colors@1"]

    run(tmp_path, caplog, scenario)


@pytest.mark.parametrize("how", [DAMAGED, COLD])
def test_row_63_a_bad_bundle_is_refused_by_name_and_changes_nothing(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = digest_of(place(tmp_path, 0))

    async def scenario(service: Here) -> None:
        assert service.metric("clarifier_bundle_last_load_success") == 1
        place(tmp_path, 1, how)  # another one in the place of what is served
        place(tmp_path, 1, how, version="2")
        await service.reload("goes on as it was loaded before")
        await service.until(lambda: service.metric("clarifier_bundle_last_load_success") == 0)
        await service.until(lambda: service.gateway.catalog.refused)
        names, refused = await service.models()
        assert (names, sorted(refused)) == (["colors@1"], ["colors/1", "colors/2"])
        assert await service.says() == (label_of(0), before)
        after = digest_of(place(tmp_path, 1))  # mended
        rmtree(tmp_path / "colors" / "2")
        await service.reload("from now on")
        await service.until(lambda: not service.gateway.catalog.refused)
        assert await service.says() == (label_of(1), after)
        assert service.metric("clarifier_bundle_last_load_success") == 1

    run(tmp_path, caplog, scenario)


def test_what_is_served_goes_on_though_its_files_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path, 0)

    async def scenario(service: Here) -> None:
        place(tmp_path, 0, DAMAGED)
        await service.reload("goes on as it was loaded before")
        await service.until(lambda: service.gateway.catalog.refused)
        assert "sha256" in (await service.models())[1]["colors/1"]
        assert (await service.says())[0] == label_of(0)

    run(tmp_path, caplog, scenario)


def test_row_65_a_reload_that_runs_out_of_memory_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = digest_of(place(tmp_path, 0))

    async def scenario(service: Here) -> None:
        place(tmp_path, 1)
        place(tmp_path, 0, HUGE, version="2")
        await service.reload(KEPT)
        assert "MemoryError" in caplog.text
        assert (await service.models())[0] == ["colors@1"]
        assert await service.says() == (label_of(0), before)
        assert service.metric("clarifier_bundle_last_load_success") == 0
        rmtree(tmp_path / "colors" / "2")
        await service.reload("from now on")  # and is not the last one
        await service.until(lambda: service.metric("clarifier_bundle_last_load_success") == 1)
        assert (await service.says())[0] == label_of(1)

    run(tmp_path, caplog, scenario)


def test_a_version_whose_directory_is_gone_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path, 0)
    place(tmp_path, 1, version="2")

    async def scenario(service: Here) -> None:
        old = service.bundle("colors@2")
        old.gate.clear()
        asked = asyncio.create_task(service.says())
        await service.until(old.entered.is_set)
        rmtree(tmp_path / "colors" / "2")
        await service.reload("from now on")
        await service.until(lambda: len(service.gateway.catalog.bundles) == 1)
        old.gate.set()
        assert (await asked)[0] == label_of(1)
        assert (await service.says())[0] == label_of(0)
        gone = await service.made.post("/classify?model=colors@2", content=GOOD)
        assert gone.json()["code"] == "unknown_model"

    run(tmp_path, caplog, scenario)


@pytest.mark.parametrize("other", [None, "other"])
def test_a_reload_that_would_leave_nothing_or_no_default_model_changes_nothing(
    other: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path, 0)

    async def scenario(service: Here) -> None:
        rmtree(tmp_path / "colors")
        if other is not None:
            place(tmp_path, name=other)
        await service.reload(KEPT)
        assert (await service.models())[0] == ["colors@1"]
        assert (await service.says())[0] == label_of(0)
        assert (await service.made.get("/readyz")).status_code == 200

    run(tmp_path, caplog, scenario)


def test_what_was_empty_at_the_start_can_be_filled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(service: Here) -> None:
        assert (await service.made.get("/readyz")).status_code == 503
        place(tmp_path, 0)
        await service.reload("from now on")
        await service.until(lambda: service.gateway.why_not_ready() is None)
        assert (await service.says())[0] == label_of(0)

    run(tmp_path, caplog, scenario)


def test_row_65_whoever_asks_while_a_reload_runs_gets_one_more_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path, 0)

    async def scenario(service: Here) -> None:
        slow = place(tmp_path, 1, SLOW)
        await service.reload("looking at")
        await service.until((slow / "loading").exists)
        for _ in range(3):
            service.gateway.reload()
        assert (await service.says())[0] == label_of(0)  # meanwhile
        assert caplog.text.count("looking at") == 1
        (slow / SLOW).unlink()
        await service.until(lambda: UNCHANGED in caplog.text)
        assert caplog.text.count("looking at") == 2
        assert (await service.says())[0] == label_of(1)

    run(tmp_path, caplog, scenario)


# --- whole processes


@contextmanager
def gateway(root: Path, **settings: Any) -> Iterator[tuple[Popen[str], httpx.Client, Log]]:
    with shelf_process("gateway", root, **settings) as started:
        assert started.stdout is not None
        port = int(started.stdout.readline())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            yield started, client, Log(root)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def is_answered_by(digest: str, answers: list[httpx.Response]) -> bool:
    """Whether the last answer came from this bundle."""
    return bool(answers) and answers[-1].json()["digest"] == digest


@contextmanager
def stream(post: Callable[[], httpx.Response], clients: int = 4) -> Iterator[list[httpx.Response]]:
    """Everything that `clients` are answered, each asking as soon as it was answered."""
    answers, stopping = list[httpx.Response](), threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            answers.append(post())

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            stopping.set()
        for each in asking:
            each.result()


def test_row_65_no_request_fails_while_bundles_are_swapped_under_load(tmp_path: Path) -> None:
    digests = {digest_of(place(tmp_path, turn)): label_of(turn) for turn in (2, 1, 0)}
    with gateway(tmp_path) as (started, client, log):
        until(lambda: is_ready(client))
        with stream(lambda: client.post("/classify?defense=none", content=GOOD)) as answers:
            for turn in (1, 2, 0, 1):
                digest = digest_of(place(tmp_path, turn))
                hang_up(started)
                until(partial(is_answered_by, digest, answers))
        assert {answer.status_code for answer in answers} == {200}
        pairs = {(answer.json()["digest"], answer.json()["label"]) for answer in answers}
        assert pairs == set(digests.items())  # each by the bundle that it names
        page = client.get("/metrics").text
        assert page.count("\nclarifier_model_info{") == 1
        assert "\nclarifier_queue_depth 0.0" in page
        started.terminate()
        assert started.wait(LIMIT_S) == 0
        assert log.count("Traceback") == 0


def test_sighup_while_it_starts_means_once_more_afterwards(tmp_path: Path) -> None:
    slow = place(tmp_path, 0, SLOW)
    with gateway(tmp_path) as (started, client, log):
        until((slow / "loading").exists)
        hang_up(started)
        (slow / SLOW).unlink()
        until(lambda: is_ready(client))
        until(lambda: log.count(UNCHANGED) == 1)


def test_row_76_sigterm_during_a_reload_answers_what_was_accepted_and_exits_0(tmp_path: Path) -> None:
    place(tmp_path, 0)
    with (
        gateway(tmp_path, FAKE_DELAY_S=6, max_batch_size=1) as (started, client, log),
        ThreadPoolExecutor(2) as clients,
    ):
        until(lambda: is_ready(client))
        slow = place(tmp_path, 1, SLOW)
        hang_up(started)
        until((slow / "loading").exists)
        answers = [clients.submit(client.post, "/classify?defense=none", content=GOOD) for _ in range(2)]
        until(lambda: client.get("/metrics").text.count("clarifier_queue_depth 1.0"))
        started.send_signal(signal.SIGTERM)
        hang_up(started)  # nobody minds
        assert [answer.result().json()["label"] for answer in answers] == [label_of(0)] * 2
        assert started.wait(LIMIT_S) == 0
        assert log.count("looking at") == 1


def test_row_56_a_key_that_is_revoked_is_unknown_after_a_sighup(tmp_path: Path) -> None:
    place(tmp_path / "bundles")
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("first", "one") + entry("second", "two"))

    def status(client: httpx.Client, key: str) -> int:
        return client.post("/classify", content=GOOD, headers={"X-API-Key": key}).status_code

    with gateway(tmp_path / "bundles", api_keys_file=keys) as (started, client, log):
        until(lambda: is_ready(client))
        assert [status(client, key) for key in ("one", "two", "three")] == [200, 200, 401]
        keys.write_text(entry("second", "two") + entry("third", "three"))
        hang_up(started)
        until(lambda: status(client, "one") == 401)
        assert [status(client, key) for key in ("two", "three")] == [200, 200]
        keys.write_text("broken")
        hang_up(started)
        until(lambda: log.count("the keys are what they were") == 1)
        assert [status(client, key) for key in ("one", "two", "three")] == [401, 200, 200]


# --- with Redis


@pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)
class TestWorker:
    """A worker that is told to reload."""

    def test_no_request_fails_while_its_bundles_are_swapped(self, farm: Farm, tmp_path: Path) -> None:
        digests = {digest_of(place(tmp_path, turn)): label_of(turn) for turn in (1, 0)}
        port = own_redis.free_port()
        server = farm.gateway(request_timeout_ms=10_000)
        settings = {"redis_url": farm.redis.url, "worker_port": port, "request_timeout_ms": 10_000}
        with shelf_process("worker", tmp_path, **settings) as started:
            log = Log(tmp_path)
            until(partial(is_ready, server.client))
            with stream(lambda: classify(server, GOOD, "?defense=none")) as answers:
                after = digest_of(place(tmp_path, 1))
                hang_up(started)
                until(partial(is_answered_by, after, answers))
                until(lambda: log.count("takes images for colors@1, colors@1") == 1)
                until(lambda: log.count("has let go of") == 1)
            assert {answer.status_code for answer in answers} == {200}
            assert {(answer.json()["digest"], answer.json()["label"]) for answer in answers} == set(digests.items())
            page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            assert page.count("\nclarifier_model_info{") == 1
            assert after in page
            place(tmp_path, 0, DAMAGED)
            hang_up(started)
            until(lambda: log.count("goes on as it was loaded before") == 1)
            assert classify(server, GOOD, "?defense=none").json()["label"] == label_of(1)
            started.terminate()
            assert started.wait(LIMIT_S) == 0

    def test_what_a_gateway_asked_for_before_it_knew_is_answered(self, farm: Farm, tmp_path: Path) -> None:
        place(tmp_path, 0)
        place(tmp_path, 2, version="2")
        server = farm.gateway(request_timeout_ms=60_000, body_timeout_s=60)
        rest = threading.Event()

        def upload() -> Iterator[bytes]:
            yield GOOD[:10]
            rest.wait(LIMIT_S)
            yield GOOD[10:]

        settings = {"redis_url": farm.redis.url, "request_timeout_ms": 60_000}
        with shelf_process("worker", tmp_path, **settings) as started, ThreadPoolExecutor(1) as clients:
            until(partial(is_ready, server.client))
            url = "/classify?defense=none&model=colors@2"
            asked = clients.submit(server.client.post, url, content=upload(), timeout=LIMIT_S)
            until(lambda: server.gateway._in_flight)
            rmtree(tmp_path / "colors" / "2")
            hang_up(started)
            until(lambda: list(server.gateway.catalog.bundles) == ["colors@1"])
            rest.set()
            assert asked.result().json()["label"] == label_of(2)
            gone = server.client.post(url, content=GOOD)
            assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")

    def test_sigterm_during_a_reload_ends_it_with_0(self, farm: Farm, tmp_path: Path) -> None:
        place(tmp_path, 0)
        server = farm.gateway()
        with shelf_process("worker", tmp_path, redis_url=farm.redis.url) as started:
            until(partial(is_ready, server.client))
            slow = place(tmp_path, 1, SLOW)
            hang_up(started)
            until((slow / "loading").exists)
            assert classify(server, GOOD, "?defense=none").json()["label"] == label_of(0)
            started.terminate()
            assert started.wait(LIMIT_S) == 0
