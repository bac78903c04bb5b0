"""Half of what the service can do, most of it, all of it, more, and ten times as much.

Requests come on the clock, whatever became of the earlier ones, and each is timed from the moment when it was due: no
slow answer hides behind a client that waits for it. What is wanted at every rate: the engine goes on at its capacity,
the excess is refused at once (429 with `Retry-After`), what is accepted is answered within its deadline, and a few
seconds later nothing is left of it all.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.client import BUNDLE, classify, photo, read_answer, read_status, service, status_of
from models import load_bundle
from service.settings import Settings

DEFENSE = "aid"
MAX_BATCH_SIZE = 8
"""So that a batch takes about a second of two cores, not four: a crowd is not over before the last batch is."""
CLIENTS = 2 * MAX_BATCH_SIZE
CAPACITY_S = 20.0
RATES_S = {0.5: 30.0, 0.8: 30.0, 1.0: 45.0, 1.5: 45.0, 10.0: 60.0}
"""Seconds at each rate, a multiple of the capacity."""
LEAD_IN_S = 5.0
"""Until the first answers have come: they do not count for the goodput."""
REFUSED = 429
WANTED = {"goodput": 0.9, "p99_to_deadline": 1.0, "recovery_s": 5.0, "failed": 0}


@dataclass
class Outcomes:
    """Statuses and the seconds that good answers took; 0 stands for a connection that broke."""

    statuses: Counter[int] = field(default_factory=Counter)
    unexplained: int = 0
    """Refusals without `Retry-After`."""
    good_s: list[float] = field(default_factory=list)
    good_at: list[float] = field(default_factory=list)


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    request = classify(photo(load_bundle(BUNDLE).manifest.input_size), DEFENSE)
    with service(max_batch_size=str(MAX_BATCH_SIZE)) as port:
        return asyncio.run(_measure(port, request))


async def _measure(port: int, request: bytes) -> dict[str, object]:
    capacity = await _closed_loop(port, request, CAPACITY_S)
    print(f"{DEFENSE}, open loop, capacity {capacity:.0f} requests/s:")
    rates = {f"{times:g}": await _at(port, request, times, capacity, seconds) for times, seconds in RATES_S.items()}
    setting = {"max_batch_size": MAX_BATCH_SIZE, "clients": CLIENTS, "lead_in_s": LEAD_IN_S}
    return {"defense": DEFENSE, **setting, "capacity_per_s": capacity, "rates": rates, "wanted": WANTED}


async def _at(port: int, request: bytes, times: float, capacity: float, seconds: float) -> dict[str, object]:
    """The figures of one rate. `goodput` is good answers a second, of what could be answered at that rate."""
    outcomes, started = Outcomes(), time.perf_counter()
    await _open_loop(port, request, times * capacity, seconds, outcomes)
    await _until_as_usual(port, request, 2 * CLIENTS / capacity)
    recovery_s = max(0.0, time.perf_counter() - started - seconds)
    deadline_s = Settings.model_fields["request_timeout_ms"].default / 1000
    meanwhile = sum(LEAD_IN_S < at - started <= seconds for at in outcomes.good_at)
    p50_s, p99_s = (statistics.quantiles(outcomes.good_s, n=100)[percent - 1] for percent in (50, 99))
    goodput = meanwhile / (seconds - LEAD_IN_S) / (capacity * min(1.0, times))
    statuses = dict(sorted(outcomes.statuses.items()))
    print(f"  {times:>4g} x: {statuses}, goodput {goodput:.2f}, p50 {p50_s:.2f} s, p99 {p99_s:.2f} s", end="")
    print(f" of {deadline_s:g} s, as usual after {recovery_s:.1f} s")
    return {
        "seconds": seconds,
        "offered_per_s": sum(statuses.values()) / seconds,
        "statuses": statuses,
        "failed": sum(count for status, count in statuses.items() if status not in (200, REFUSED)),
        "refused_without_retry_after": outcomes.unexplained,
        "goodput": goodput,
        "p50_s": p50_s,
        "p99_s": p99_s,
        "p99_to_deadline": p99_s / deadline_s,
        "recovery_s": recovery_s,
    }


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
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            clients.create_task(_ask(port, request, outcomes, due))


async def _ask(port: int, request: bytes, outcomes: Outcomes, due: float) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head, _ = await read_answer(reader)
        writer.close()
        status = status_of(head)
    except (OSError, asyncio.IncompleteReadError):
        status, head = 0, b""
    outcomes.statuses[status] += 1
    outcomes.unexplained += status == REFUSED and b"retry-after:" not in head.lower()
    if status == 200:
        outcomes.good_at.append(time.perf_counter())
        outcomes.good_s.append(outcomes.good_at[-1] - due)


async def _until_as_usual(port: int, request: bytes, usual_s: float) -> None:
    """Ask until an answer takes no longer than `usual_s`."""
    while True:
        outcomes = Outcomes()
        await _ask(port, request, outcomes, time.perf_counter())
        if outcomes.good_s and outcomes.good_s[0] <= usual_s:
            return
