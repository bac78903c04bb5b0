"""A rolling update: gateways and workers are replaced one after the other while clients ask and ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import httpx
import pytest

from tests.service import own_redis
from tests.service.conftest import until
from tests.service.farm import GOOD, Farm

ROOT = Path(__file__).parents[2]
CLIENTS = 6
DRAIN_DELAY_S = 2
"""Longer than a client takes from its look at /readyz to its request."""
pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)


@pytest.mark.slow
def test_row_77_while_gateways_and_workers_are_replaced_no_request_fails(farm: Farm) -> None:
    answered, stop = Counter[object](), Event()
    with ExitStack() as stack:
        workers = [worker(farm) for _ in range(2)]
        gateways = [gateway(farm, stack) for _ in range(2)]
        with httpx.Client() as client:
            until(lambda: all(is_ready(client, port) for _, port in (*workers, *gateways)), 60)
        clients = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        stack.callback(stop.set)
        asking = [clients.submit(ask_and_ask, gateways, answered, stop) for _ in range(CLIENTS)]
        for old in gateways.copy():
            replace(old, gateway(farm, stack), gateways, answered)
        for old in workers.copy():
            replace(old, worker(farm), workers, answered)
        stop.set()
        for each in asking:
            each.result()
    assert answered[200] > 100
    assert answered.keys() <= {200, 429}, answered


Replaceable = tuple[subprocess.Popen[bytes], int]
"""A process and the port of its probes."""


def replace(old: Replaceable, new: Replaceable, fleet: list[Replaceable], answered: Counter[object]) -> None:
    """As with `maxUnavailable: 0`: the new one is ready before the old one is told to end."""
    with httpx.Client() as client:
        until(lambda: is_ready(client, new[1]), 60)
    fleet.append(new)
    process, _ = old
    process.terminate()
    assert process.wait(60) == 0
    fleet.remove(old)
    before = answered[200]
    until(lambda: answered[200] >= before + 2 * CLIENTS)  # the new one has had its share


def ask_and_ask(gateways: list[Replaceable], answered: Counter[object], stop: Event) -> None:
    """A client behind a balancer that knows who is ready: a connection for each request."""
    with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=30) as client:
        while not stop.is_set():
            for _, port in gateways.copy():
                if is_ready(client, port):
                    answered[outcome(client, "POST", port, "/classify", GOOD)] += 1


def outcome(client: httpx.Client, method: str, port: int, path: str, content: bytes = b"") -> object:
    """The status, or what went wrong with the connection."""
    try:
        return client.request(method, f"http://127.0.0.1:{port}{path}", content=content).status_code
    except httpx.TransportError as error:
        return repr(error)


def is_ready(client: httpx.Client, port: int) -> bool:
    return outcome(client, "GET", port, "/readyz") == 200


def worker(farm: Farm) -> Replaceable:
    port = own_redis.free_port()
    return farm.worker(worker_port=port, max_batch_size=4, delay_s=0.05), port


def gateway(farm: Farm, stack: ExitStack) -> Replaceable:
    """`python -m service`, as it is deployed."""
    port = own_redis.free_port()
    settings = {"QUEUE": "redis", "REDIS_URL": farm.url, "PORT": port, "DEFAULT_MODEL": "colors"}
    settings |= {"DRAIN_DELAY_S": DRAIN_DELAY_S, "LOG_LEVEL": "WARNING"}
    environment = os.environ | {f"CLARIFIER_{name}": str(value) for name, value in settings.items()}
    process = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, port
