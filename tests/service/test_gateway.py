"""Readiness and liveness, from facts of the moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.batching import Batcher
from service.repository import Catalog
from tests.service.conftest import Running, until
from tests.service.fakes import FATAL_VALUE, green, marked, png

GOOD = png(green())


def probes(server: Running) -> tuple[int, int]:
    """Status of /livez and /readyz."""
    return server.client.get("/livez").status_code, server.client.get("/readyz").status_code


def test_a_service_that_can_answer_is_live_and_ready(service: Running) -> None:
    assert probes(service) == (200, 200)
    assert service.client.get("/readyz").json() == {"status": "ready"}


def test_a_running_batch_does_not_make_the_service_unready(start: Callable[..., Running]) -> None:
    server = start()
    server.bundle.gate.clear()
    with ThreadPoolExecutor(1) as clients:
        held = clients.submit(server.client.post, "/classify", content=GOOD)
        assert server.bundle.entered.wait(20)
        assert isinstance(server.gateway.batcher, Batcher)
        server.gateway.batcher._beat -= 10  # it has run for ten seconds
        assert probes(server) == (200, 200)
        server.gateway.batcher._beat -= 25  # longer than any request may take
        assert probes(server) == (200, 503)
        server.gateway.batcher._beat -= 60  # three times that
        assert probes(server) == (503, 503)
        server.bundle.gate.set()
        held.result()
    assert probes(server) == (200, 200)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit ends it
def test_row_53_an_engine_that_has_ended_takes_readiness_and_liveness_with_it(
    start: Callable[..., Running],
) -> None:
    server = start()
    response = server.client.post("/classify?defense=none", content=png(marked(FATAL_VALUE)))
    assert response.status_code in (500, 503)
    until(lambda: probes(server) == (503, 503))
    after = server.client.post("/classify", content=GOOD)
    assert (after.status_code, after.json()["code"]) == (503, "not_ready")
    assert after.headers["retry-after"]


def test_a_draining_service_is_live_and_not_ready_and_says_why(start: Callable[..., Running]) -> None:
    server = start()
    server.gateway.draining = True  # the drain delay: not ready, but accepting
    assert probes(server) == (200, 503)
    assert server.client.get("/readyz").json() == {"status": "not ready", "reason": "draining"}
    assert server.client.post("/classify", content=GOOD).status_code == 200
    server.gateway.begin_drain()
    refused = server.client.post("/classify", content=GOOD)
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert (refused.headers["connection"], "retry-after" in refused.headers) == ("close", True)
    assert probes(server) == (200, 503)


def test_an_idle_engine_that_is_silent_is_not_ready(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = service.gateway.batcher
    assert batcher is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(batcher), "silence_s", 2.5)
        assert probes(service) == (200, 503)
    assert probes(service) == (200, 200)


def test_before_loading_the_gateway_is_live_and_says_that_it_loads(service: Running) -> None:
    empty = dataclasses.replace(service.gateway, catalog=Catalog({}), batcher=None)
    assert empty.why_not_ready() == "loading"
    assert empty.why_not_live() is None
