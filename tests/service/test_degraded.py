"""Row 47: images that AID never finds natural take no more of the engine than they may, and their answers say so."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from pydantic import SecretStr

from models.bundle_files import save_bundle
from service.engine import Engine
from service.loading import load_engine
from service.metrics import Metrics
from service.remote.engine import RemoteEngine
from service.remote.store import Store
from service.settings import Settings
from service.tokens import TokenBucket
from service.work import Classified, Key, Operation
from tests.networks import REAL_SIZE, real_bundle, with_auto
from tests.service import own_redis
from tests.service.clock import Clock
from tests.service.conftest import Server, serving, until
from tests.service.fakes import FakeBundle, batch, dark, green, loaded, png
from tests.service.farm import Farm, ready
from tests.service.manifests import fake_manifest

DARK, GOOD = png(dark()), png(green())
NPY = {"accept": "application/x-npy"}


@contextmanager
def capped(clock: Clock, burst: int = 1, **settings: Any) -> Iterator[Server]:
    """A server whose `auto` may run its strong chain twice a second."""
    bundle = FakeBundle(fake_manifest(auto=True))
    bucket = TokenBucket(2.0, burst, clock)
    with serving(lambda _: loaded(bundle, strong=bucket), {"default_model": "colors", **settings}) as server:
        ready(server)
        yield server


def classified(server: Server, image: bytes = DARK, query: str = "") -> tuple[str, bool]:
    """The chain that ran, and whether the answer says that it is degraded."""
    answer = server.client.post(f"/classify?defense=auto{query}", content=image).json()
    assert answer["defense"] == "auto"
    return answer["ran"], answer["degraded"]


def counted(server: Server) -> float:
    return server.metric("clarifier_auto_degraded_total", model="colors@1")


STRONG, DEGRADED, NATURAL = ("zeropur", False), ("none", True), ("none", False)


def test_row_47_a_flood_is_answered_by_the_cheap_chain_and_marked_until_it_is_over() -> None:
    clock = Clock()
    with capped(clock, burst=2) as server:
        assert [classified(server) for _ in range(5)] == [STRONG, STRONG, DEGRADED, DEGRADED, DEGRADED]
        assert classified(server, GOOD) == NATURAL
        assert classified(server, query="&explain=true") == DEGRADED
        assert counted(server) == 4
        clock.now = 0.5
        assert [classified(server) for _ in range(2)] == [STRONG, DEGRADED]
        assert counted(server) == 5


def test_row_47_in_a_batch_each_answer_says_it_for_itself() -> None:
    with capped(Clock()) as server:
        files = batch(GOOD, DARK, DARK, b"no image", GOOD)
        results = server.client.post("/classify/batch?defense=auto", files=files).json()["results"]
    assert [(result.get("ran"), result.get("degraded")) for result in results] == [
        NATURAL, STRONG, DEGRADED, (None, None), NATURAL,
    ]  # fmt: skip


def test_row_47_a_purified_image_says_so_in_a_header() -> None:
    with capped(Clock()) as server:
        answers = [server.client.post("/purify?defense=auto", content=image, headers=NPY) for image in (DARK, DARK)]
        natural = server.client.post("/purify?defense=auto", content=GOOD, headers=NPY)
        assert counted(server) == 1
    marks = [answer.headers.get("x-clarifier-degraded") for answer in (*answers, natural)]
    assert marks == [None, "true", None]
    strong, cheap = (np.load(io.BytesIO(answer.content)) for answer in answers)
    assert np.allclose(strong, dark()[::-1] / 255)
    assert np.allclose(cheap, dark() / 255)


def test_row_47_a_zip_of_purified_images_lists_which_are_degraded() -> None:
    with capped(Clock()) as server:
        answer = server.client.post("/purify/batch?defense=auto", files=batch(DARK, GOOD, DARK))
    with ZipFile(io.BytesIO(answer.content)) as archive:
        results = json.loads(archive.read("results.json"))["results"]
    assert [result["degraded"] for result in results] == [False, False, True]


def test_row_47_an_inference_of_v2_says_so_in_its_parameters() -> None:
    image = base64.b64encode(DARK).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}
    body = {"inputs": [tensor], "parameters": {"defense": "auto"}}
    with capped(Clock()) as server:
        said = [server.client.post("/v2/models/colors/infer", json=body).json()["parameters"] for _ in range(2)]
    assert [parameters.get("degraded") for parameters in said] == [None, True]


def test_row_47_a_degraded_answer_is_not_kept() -> None:
    clock = Clock()
    with capped(clock, cache_ttl_s=3600.0) as server:
        other = dark()
        other[0, 0, 0] += 5
        assert [classified(server, image) for image in (DARK, png(other), png(other))] == [STRONG, DEGRADED, DEGRADED]
        purified = [server.client.post("/purify?defense=auto", content=png(other)).headers for _ in range(2)]
        assert [headers.get("x-clarifier-degraded") for headers in purified] == ["true", "true"]
        clock.now = 0.5
        assert [classified(server, png(other)) for _ in range(2)] == [STRONG, STRONG]  # the second is known
        assert server.metric("clarifier_cache_requests_total", result="hit") == 1
        assert classified(server, DARK) == STRONG
        assert server.metric("clarifier_cache_requests_total", result="hit") == 2


@pytest.mark.parametrize(("per_s", "expected"), [(0.0, [STRONG] * 3), (1e-9, [STRONG, DEGRADED, DEGRADED])])
def test_row_47_the_setting_caps_bundles_that_are_loaded(
    per_s: float, expected: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(with_auto(real_bundle(), 1.0), tmp_path / "tiny" / "1")
    monkeypatch.setattr(Engine, "warm", lambda *_: None)
    engine = load_engine(
        Settings(model_repository=tmp_path, device="cpu", max_batch_size=1, auto_strong_per_s=per_s)
    ).run_batch
    image = np.zeros((REAL_SIZE, REAL_SIZE, 3), np.uint8)
    outcomes = [engine(Key(Operation.CLASSIFY, "tiny@1", "auto"), [image], [0]).outcomes[0] for _ in range(3)]
    assert [(one.ran, one.degraded) for one in outcomes if isinstance(one, Classified)] == expected


@contextmanager
def working(url: str, bundle: FakeBundle, bucket: TokenBucket) -> Iterator[None]:
    """A worker in a thread of this process, with the real engine."""
    settings = Settings(queue="redis", redis_url=SecretStr(url), default_model="colors", drain_timeout_s=5.0)
    made: list[RemoteEngine] = []

    async def work() -> None:
        made.append(RemoteEngine(settings, loaded(bundle, strong=bucket), Store(url), Metrics()))
        await made[0].run()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        yield
    finally:
        until(lambda: made)
        made[0].draining = True
        thread.join(20)


@pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)
def test_row_47_a_worker_caps_what_it_runs_and_its_gateway_passes_the_mark_on(farm: Farm) -> None:
    clock = Clock()
    bundle = FakeBundle(fake_manifest(auto=True))
    server = farm.gateway()
    with working(farm.url, bundle, TokenBucket(2.0, 1, clock)):
        ready(server)
        assert [classified(server) for _ in range(2)] == [STRONG, DEGRADED]
        assert classified(server, GOOD) == NATURAL
        purified = server.client.post("/purify?defense=auto", content=DARK)
        assert (purified.status_code, purified.headers["x-clarifier-degraded"]) == (200, "true")
        clock.now = 0.5
        assert classified(server) == STRONG
        assert counted(server) == 2
