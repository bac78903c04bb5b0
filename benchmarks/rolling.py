"""Two gateways and two workers are replaced, one after the other, while requests go on coming on the clock.

Their engine sleeps. A balancer in front of the gateways, here the load generator itself, asks each `/readyz` as
Kubernetes does and sends to those that are ready. What is wanted: no request fails.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.client import classify, photo, port_of, read_answer, read_status, status_of
from benchmarks.farm import end, own_redis, start_sleeping

RATE = 100
"""Requests a second: about half of what two workers can do."""
BATCH = 8
SLEEP_S = 0.08
PROBE_EVERY_S = 0.5
DRAIN_DELAY_S = 3
"""Longer than the balancer takes to notice."""
STEADY_S = 3.0
"""Between two replacements."""
WANTED = {"failed": 0}
REQUEST = classify(photo((32, 32)), "none")
READY = b"GET /readyz HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n"


@dataclass
class Fleet:
    """What runs: gateways by their port, workers; and what the balancer thinks of the gateways."""

    settings: dict[str, str]
    gateways: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    workers: list[subprocess.Popen[str]] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)

    def start(self, role: str) -> subprocess.Popen[str]:
        """One more process; a gateway is there when it has said where."""
        return start_sleeping(role, SLEEP_S, self.settings)

    def end(self) -> None:
        """All of it."""
        for process in (*self.gateways.values(), *self.workers):
            end(process)


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    with own_redis() as url, ExitStack() as stack:
        settings = {"QUEUE": "redis", "REDIS_URL": url, "MAX_BATCH_SIZE": str(BATCH)}
        fleet = Fleet(settings | {"DRAIN_DELAY_S": str(DRAIN_DELAY_S)})
        stack.callback(fleet.end)
        fleet.workers = [fleet.start("worker") for _ in range(2)]
        for _ in range(2):
            gateway = fleet.start("service")
            fleet.gateways[port_of(gateway)] = gateway
        figures = asyncio.run(_measure(fleet))
    print(f"two gateways and two workers replaced in {figures['seconds']:.0f} s under {RATE} requests/s:")
    print(f"  {figures['statuses']}")
    return figures


async def _measure(fleet: Fleet) -> dict[str, object]:
    statuses, started = Counter[int](), time.perf_counter()
    balancer = asyncio.create_task(_watch(fleet))
    await _until(lambda: len(fleet.ready) == 2)
    load = asyncio.create_task(_load(fleet, statuses))
    for old_port in list(fleet.gateways):
        await asyncio.sleep(STEADY_S)
        await _replace_gateway(fleet, old_port)
    for old in list(fleet.workers):
        await asyncio.sleep(STEADY_S)
        await asyncio.to_thread(end, old)
        fleet.workers.remove(old)
        fleet.workers.append(fleet.start("worker"))
        await asyncio.sleep(STEADY_S)  # it takes its share before the other one goes
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    balancer.cancel()
    failed = sum(count for status, count in statuses.items() if status != 200)
    return {
        "seconds": time.perf_counter() - started,
        "statuses": dict(statuses),
        "failed": failed,
        "wanted": WANTED,
    }


async def _replace_gateway(fleet: Fleet, old_port: int) -> None:
    """As with `maxUnavailable: 0`: the new one is ready before the old one is told to end."""
    new = fleet.start("service")
    new_port = await asyncio.to_thread(port_of, new)
    old = fleet.gateways.pop(old_port)
    fleet.gateways[new_port] = new
    await _until(lambda: new_port in fleet.ready)
    await asyncio.to_thread(end, old)


async def _watch(fleet: Fleet) -> None:
    """The balancer: who is ready. One that is being replaced is asked until it is gone."""
    known = set[int]()
    while True:
        known |= set(fleet.gateways)
        fleet.ready = [port for port in sorted(known) if await _is_ready(port)]
        await asyncio.sleep(PROBE_EVERY_S)


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(READY)
        status = await read_status(reader)
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return False
    return status == 200


async def _load(fleet: Fleet, statuses: Counter[int]) -> None:
    """RATE requests a second until it is cancelled; then those under way are waited for."""
    started, number = time.perf_counter(), 0
    requests = set[asyncio.Task[None]]()
    try:
        while True:
            await asyncio.sleep(max(0.0, started + number / RATE - time.perf_counter()))
            ports = fleet.ready
            request = asyncio.create_task(_ask(ports[number % len(ports)] if ports else 0, statuses))
            requests.add(request)
            request.add_done_callback(requests.discard)
            number += 1
    finally:
        await asyncio.gather(*requests)


async def _ask(port: int, statuses: Counter[int]) -> None:
    """One request on a connection of its own; a connection that breaks counts as 0."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        head, _ = await read_answer(reader)
        writer.close()
        statuses[status_of(head)] += 1
    except (OSError, asyncio.IncompleteReadError):
        statuses[0] += 1


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.05)
