"""A real server with a fake bundle: every test of a route goes through sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.connections import bounded_http
from service.gateway import Gateway
from service.loading import Loaded
from service.settings import Settings
from tests.service.fakes import FakeBundle, green, loaded, png

if TYPE_CHECKING:
    from tests.service.farm import Farm


@dataclass
class Server:
    """A server, and what is inside it."""

    client: httpx.Client
    gateway: Gateway
    port: int

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample, 0 where there is none."""
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


@dataclass
class Running(Server):
    """A server that answers."""

    bundle: FakeBundle
    refused: Counter[str] = field(default_factory=Counter)
    """How often each code was expected so far."""

    def still_answers(self) -> bool:
        """Whether the next good request gets its answer."""
        response = self.client.post("/classify?defense=none", content=png(green()))
        return response.status_code == 200 and response.json()["label"] == "green"

    def refuses(self, response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        """Assert that `response` is a well-formed problem and that the service goes on; returns the problem."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem: dict[str, Any] = response.json()
        assert problem["status"] == status
        assert problem["code"] == code
        assert problem["type"] == f"/problems/{code.replace('_', '-')}"
        assert problem["request_id"] == response.headers["x-request-id"]
        assert problem["title"]
        assert problem["detail"]
        assert self.client.get(problem["type"]).status_code == 200
        if status != 500:  # those are the engine's errors, which have a metric of their own
            self.refused[code] += 1
            until(lambda: self.metric("clarifier_rejected_total", reason=code) >= self.refused[code])
        assert self.still_answers()
        return problem


@contextmanager
def running(bundle: FakeBundle, **settings: Any) -> Iterator[Running]:
    """A server on a free port of this machine."""
    options: dict[str, Any] = {"default_model": bundle.manifest.name, "drain_timeout_s": 5.0}
    with serving(lambda _: loaded(bundle), options | settings) as server:
        try:
            until(lambda: server.gateway.why_not_ready() is None)
            yield Running(server.client, server.gateway, server.port, bundle)
        finally:
            bundle.gate.set()


@contextmanager
def serving(load: Callable[[Settings], Loaded], settings: dict[str, Any]) -> Iterator[Server]:
    """An application on a free port, ready or not."""
    app = create_app(Settings(**settings), load)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # whoever connects before the server is there waits for it
    http = bounded_http(app.state.gateway.metrics, head_timeout_s=settings.get("body_timeout_s", 10), idle_timeout_s=75)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Server(client, app.state.gateway, port)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait for `condition`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    """A server with the default settings, shared by a module."""
    with running(FakeBundle()) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start a server of one's own: `start(max_queue_size=2)`."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(FakeBundle(), **settings))


@pytest.fixture
def farm() -> Iterator[Farm]:
    """A Redis of one's own, with nobody around it."""
    from tests.service.farm import Farm

    with ExitStack() as stack:
        yield Farm(stack)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Farm, Server]]:
    """A gateway and a worker that a module shares."""
    from tests.service.farm import Farm, ready

    with ExitStack() as stack:
        farm = Farm(stack)
        server = farm.gateway()
        farm.worker()
        ready(server)
        yield farm, server
