"""What Redis costs between gateways and engines, and what more workers bring.

The engine sleeps, so that two cores can play many machines: throughput with 1, 2, 4 and 8 workers beside what so many
sleepers could do, and the time of one request beside that of the same service with its engine in it. Resident memory of
a gateway that has no engine.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack

import psutil

from benchmarks.client import classify, photo, port_of, read_status
from benchmarks.farm import own_redis, sleeping

WORKERS = (1, 2, 4, 8)
BATCH = 8
SLEEP_S = 0.1
"""Of a batch: eight workers then need 640 requests a second, which one gateway and its clients on two cores can do."""
MEASURED_S = 10.0
REQUESTS = 1000
"""One after the other."""
ROUNDS = 3
WANTED = {"efficiency_at_8": 0.9, "gateway_resident_mb": 250}
REQUEST = classify(photo((32, 32)), "none")


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    rates, resident_mb = _rates()
    efficiency = {count: rate / (count * BATCH / SLEEP_S) for count, rate in rates.items()}
    medians = [(_median_ms("memory"), _median_ms("redis")) for _ in range(ROUNDS)]
    overheads = [redis - memory for memory, redis in medians]
    figures: dict[str, object] = {
        "requests_per_s": rates,
        "efficiency": efficiency,
        "median_ms": [{"memory": memory, "redis": redis} for memory, redis in medians],
        "overhead_ms": statistics.median(overheads),
        "gateway_resident_mb": resident_mb,
        "wanted": WANTED,
    }
    print("workers, requests/s, of what so many sleepers could do:")
    for count, rate in rates.items():
        print(f"  {count}: {rate:.0f}, {efficiency[count]:.2f}")
    print(f"a request alone: {figures['overhead_ms']:.2f} ms more than {medians[0][0]:.2f} ms in memory mode")
    print(f"a gateway without an engine: {resident_mb:.0f} MB resident")
    return figures


def _rates() -> tuple[dict[int, float], float]:
    rates = dict[int, float]()
    with own_redis() as url, ExitStack() as stack:
        settings = {"QUEUE": "redis", "REDIS_URL": url, "MAX_BATCH_SIZE": str(BATCH)}
        workers = 0
        process = stack.enter_context(sleeping("service", SLEEP_S, settings))
        port: int | None = None
        for count in WORKERS:
            for _ in range(count - workers):
                stack.enter_context(sleeping("worker", SLEEP_S, settings))
            workers = count
            port = port or port_of(process)
            time.sleep(2)  # until the new ones take their share
            rates[count] = asyncio.run(_rate(port, 2 * BATCH * count))
        return rates, psutil.Process(process.pid).memory_info().rss / 1e6


def _median_ms(queue: str) -> float:
    with own_redis() as url, ExitStack() as stack:
        settings = {"QUEUE": queue, "REDIS_URL": url}
        process = stack.enter_context(sleeping("service", 0.0, settings))
        if queue == "redis":
            stack.enter_context(sleeping("worker", 0.0, settings))
        return asyncio.run(_alone(port_of(process)))


async def _rate(port: int, clients: int) -> float:
    """Answers a second of so many clients that each wait for their answer."""
    answered, ends = 0, time.perf_counter() + MEASURED_S

    async def client() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < ends:
            writer.write(REQUEST)
            if (status := await read_status(reader)) != 200:
                raise RuntimeError(f"an answer was {status}")
            answered += 1
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / (time.perf_counter() - started)


async def _alone(port: int) -> float:
    """The median time of a request, in milliseconds, one after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times = list[float]()
    for _ in range(REQUESTS):
        started = time.perf_counter()
        writer.write(REQUEST)
        await read_status(reader)
        times.append(1000 * (time.perf_counter() - started))
    writer.close()
    return statistics.median(times[REQUESTS // 10 :])
