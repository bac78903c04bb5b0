"""Ten times what the service can do, for a minute: requests come on the clock, whatever became of the earlier ones.

What is wanted: the excess is refused at once (429), what is accepted is answered within its deadline, the engine
goes on at its capacity, and a few seconds later nothing is left of it all.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.client import BUNDLE, classify, photo, read_status, service
from models import load_bundle
from service.settings import Settings

DEFENSE = "aid"
CLIENTS = 64
CAPACITY_S = 15.0
OVERLOAD_S = 60.0
TIMES = 10
WANTED = {"goodput_to_capacity": 0.9, "p99_to_deadline": 1.0, "recovery_s": 5.0}


@dataclass
class Outcomes:
    """Statuses and the seconds that good answers took; 0 stands for a connection that broke."""

    statuses: Counter[int] = field(default_factory=Counter)
    good_s: list[float] = field(default_factory=list)
    good_at: list[float] = field(default_factory=list)


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    request = classify(photo(load_bundle(BUNDLE).manifest.input_size), DEFENSE)
    with service() as port:
        return asyncio.run(_measure(port, request))


async def _measure(port: int, request: bytes) -> dict[str, object]:
    capacity = await _closed_loop(port, request, CAPACITY_S)
    outcomes, started = Outcomes(), time.perf_counter()
    await _open_loop(port, request, TIMES * capacity, OVERLOAD_S, outcomes)
    await _until_as_usual(port, request, 2 * CLIENTS / capacity)
    recovery_s = time.perf_counter() - started - OVERLOAD_S
    deadline_s = Settings.model_fields["request_timeout_ms"].default / 1000
    meanwhile = sum(at <= started + OVERLOAD_S for at in outcomes.good_at)
    p99_s = statistics.quantiles(outcomes.good_s, n=100)[98]
    figures: dict[str, object] = {
        "capacity_per_s": capacity,
        "offered_per_s": sum(outcomes.statuses.values()) / OVERLOAD_S,
        "statuses": dict(sorted(outcomes.statuses.items())),
        "goodput_to_capacity": meanwhile / OVERLOAD_S / capacity,
        "p99_s": p99_s,
        "p99_to_deadline": p99_s / deadline_s,
        "recovery_s": recovery_s,
        "wanted": WANTED,
    }
    print(f"{DEFENSE}, open loop at {figures['offered_per_s']:.0f} requests/s, capacity {capacity:.0f}:")
    print(f"  statuses {figures['statuses']}, goodput {figures['goodput_to_capacity']:.2f} of capacity,")
    print(f"  p99 of the accepted {p99_s:.1f} s of {deadline_s:g} s, recovered after {recovery_s:.1f} s")
    return figures


async def _closed_loop(port: int, request: bytes, seconds: float) -> float:
    """Answers per second of CLIENTS keep-alive clients."""
    outcomes, started = Outcomes(), time.perf_counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - started < seconds:
            writer.write(request)
            outcomes.statuses[await read_status(reader)] += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    if set(outcomes.statuses) != {200}:
        raise RuntimeError(f"answers below capacity were {dict(outcomes.statuses)}")
    return outcomes.statuses[200] / (time.perf_counter() - started)


async def _open_loop(port: int, request: bytes, rate: float, seconds: float, outcomes: Outcomes) -> None:
    """`rate` requests per second, each on a connection of its own, for `seconds`; ends with the last answer."""
    started = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            clients.create_task(_ask(port, request, outcomes))


async def _ask(port: int, request: bytes, outcomes: Outcomes) -> None:
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        status = await read_status(reader)
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        status = 0
    outcomes.statuses[status] += 1
    if status == 200:
        outcomes.good_at.append(time.perf_counter())
        outcomes.good_s.append(outcomes.good_at[-1] - began)


async def _until_as_usual(port: int, request: bytes, usual_s: float) -> None:
    """Ask until an answer takes no longer than `usual_s`."""
    while True:
        outcomes = Outcomes()
        await _ask(port, request, outcomes)
        if outcomes.good_s and outcomes.good_s[0] <= usual_s:
            return
