"""Start and stop of the application, without a socket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from models.recorded import Recorded
from service.app import create_app
from service.engine import Engine
from service.loading import Loaded, load_engine
from service.settings import Settings
from tests.service.fakes import FakeBundle, green, loaded, png
from tests.service.manifests import fake_manifest

GOOD = png(green())


@asynccontextmanager
async def client(load: Callable[[Settings], Loaded]) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(default_model="colors"), load)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made,
    ):
        yield made


def loads_after(gate: threading.Event) -> Callable[[Settings], Loaded]:
    def load(_: Settings) -> Loaded:
        gate.wait(20)
        return loaded(FakeBundle())

    return load


async def ready(made: httpx.AsyncClient) -> dict[str, object]:
    """What /readyz says once it no longer says that it is loading."""
    async with asyncio.timeout(20):
        while (answer := (await made.get("/readyz")).json()).get("reason") == "loading":
            await asyncio.sleep(0.005)
    return dict(answer)


def test_the_service_is_live_while_it_loads_and_ready_when_it_is_warm() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def load(_: Settings) -> Loaded:
            assert gate.wait(20)
            return loaded(FakeBundle())

        async with client(load) as made:
            assert (await made.get("/livez")).status_code == 200
            assert (await made.get("/readyz")).json() == {"status": "not ready", "reason": "loading"}
            early = await made.post("/classify", content=GOOD)
            assert (early.status_code, early.json()["code"]) == (503, "not_ready")
            assert early.headers["retry-after"]
            gate.set()
            assert await ready(made) == {"status": "ready"}
            assert (await made.post("/classify", content=GOOD)).status_code == 200

    asyncio.run(scenario())


def test_row_63_without_a_sound_bundle_the_service_is_live_and_not_ready() -> None:
    async def scenario() -> None:
        async with client(lambda _: loaded()) as made:
            assert await ready(made) == {"status": "not ready", "reason": "no bundle is loaded"}
            assert (await made.get("/livez")).status_code == 200
            assert (await made.post("/classify", content=GOOD)).json()["code"] == "not_ready"
            assert (await made.get("/models")).json()["models"] == []

    asyncio.run(scenario())


def test_without_its_default_model_the_service_is_not_ready_but_the_others_answer() -> None:
    async def scenario() -> None:
        async with client(lambda _: loaded(FakeBundle(fake_manifest("other")))) as made:
            assert await ready(made) == {"status": "not ready", "reason": "the default model colors is not loaded"}
            assert (await made.post("/classify", content=GOOD)).json()["code"] == "unknown_model"
            assert (await made.post("/classify?model=other", content=GOOD)).status_code == 200

    asyncio.run(scenario())


def test_loading_that_fails_is_logged_and_leaves_the_service_not_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(_: Settings) -> Loaded:
        raise RuntimeError("canary")

    async def scenario() -> None:
        async with client(load) as made:
            answer = await ready(made)
            assert answer == {"status": "not ready", "reason": "loading failed"}

    asyncio.run(scenario())
    assert "canary" in caplog.text


def test_a_model_that_is_being_loaded_is_not_unknown() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        async with client(loads_after(gate)) as made:
            early = await made.get("/models/colors")
            gate.set()
            await ready(made)
            late = await made.get("/models/colors")
            unknown = await made.get("/models/nobody")
        assert (early.status_code, early.json()["code"]) == (503, "not_ready")
        assert (late.status_code, unknown.status_code) == (200, 404)

    asyncio.run(scenario())


def test_a_stop_while_loading_is_clean() -> None:
    async def scenario() -> None:
        gate = threading.Event()
        async with client(loads_after(gate)):
            asyncio.get_running_loop().call_later(0.05, gate.set)

    asyncio.run(scenario())


def test_an_empty_repository_loads_as_nothing(tmp_path: Path) -> None:
    result = load_engine(Settings(model_repository=tmp_path, device="cpu"))
    assert result.catalog.bundles == {}
    assert result.device == "cpu"


def test_every_sound_bundle_is_warmed_before_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed = list[tuple[list[str], list[int]]]()

    def warm(engine: Engine, sizes: list[int]) -> None:
        warmed.append((list(engine._generations[0]), sizes))

    monkeypatch.setattr(Engine, "warm", warm)
    repository = Path(__file__).parents[2] / "models" / "bundles"
    result = load_engine(Settings(model_repository=repository, device="cpu", max_batch_size=8))
    shipped = sorted(f"{path.parent.name}@{path.name}" for path in repository.glob("*/*"))
    assert "cifar10@1" in shipped
    assert sorted(result.catalog.bundles) == shipped
    assert sorted(warmed) == [([name], [1, 4]) for name in shipped]
    assert all(
        isinstance(vars(bundle)["_classifier_twin"].forward, Recorded) for bundle in result.catalog.bundles.values()
    )


def test_a_gateway_needs_no_torch_until_it_loads_an_engine() -> None:
    code = "import sys, service.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
