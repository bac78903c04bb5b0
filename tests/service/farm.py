"""Gateways in this process and workers in others, around a real Redis."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import redis

from service.loading import load_engine
from service.remote.store import WORK
from tests.service.conftest import Server, serving, until
from tests.service.fakes import green, png
from tests.service.own_redis import EchoBundle, OwnRedis, start_worker

GOOD = png(green())
STREAM = WORK + EchoBundle().digest


class Farm:
    """A Redis, gateways in this process, workers in others."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.redis = OwnRedis()
        self.url = self.redis.url
        """Where gateways and workers look for it."""
        self.redis.start()
        stack.callback(self.redis.kill)
        self.workers: list[subprocess.Popen[bytes]] = []

    def gateway(self, **settings: Any) -> Server:
        given = {"default_model": "colors", "queue": "redis", "redis_url": self.url, "drain_timeout_s": 5.0}
        return self._stack.enter_context(serving(load_engine, {**given, **settings}))

    def worker(self, **settings: Any) -> subprocess.Popen[bytes]:
        process = start_worker(self.url, **settings)
        self._stack.callback(_end, process)
        self.workers.append(process)
        return process

    def waiting(self) -> int:
        """Entries that wait or run."""
        return int(self.redis.client().xlen(STREAM))

    def taken(self) -> int:
        """Entries that a worker has."""
        with suppress(redis.ResponseError):
            return int(self.redis.client().xpending(STREAM, "workers")["pending"])
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def ready(server: Server) -> None:
    until(lambda: server.client.get("/readyz").status_code == 200)


def classify(server: Server, image: bytes = GOOD, query: str = "", **headers: str) -> httpx.Response:
    return server.client.post(f"/classify{query}", content=image, headers=headers)


def at_once(server: Server, count: int, image: bytes = GOOD) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as clients:
        return list(clients.map(lambda _: classify(server, image), range(count)))
