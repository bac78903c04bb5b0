"""Ten thousand requests while clients leave, workers are killed and Redis loses everything.

A gateway and four workers whose engine sleeps. 30 % of the clients leave, each after a time of its own; every few
seconds a worker gets SIGKILL, and another one is started; once Redis is killed, and comes back empty after 5 s.
Whoever is refused (429, 503) comes again after `Retry-After`. What is wanted: whoever stays gets one answer, its own,
to each request; afterwards nothing is left in the queue, the metrics add up, and the gateway has not grown.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from urllib.request import urlopen

import numpy as np
import psutil
from PIL import Image

from benchmarks.client import port_of, read_answer, status_of
from benchmarks.farm import OwnRedis, end, start_sleeping

REQUESTS = 10_000
CLIENTS = 64
LEAVING = 0.3
PATIENCE_S = 0.3
"""The longest that one who leaves stays."""
WORKERS = 4
BATCH = 8
SLEEP_S = 0.05
KILL_EVERY_S = 3.0
REDIS_GONE_S = 5.0
ANSWER_WITHIN_S = 60.0
CLASSES = 10
WANTED = {"lost": 0, "wrong": 0, "failed": 0, "queue_depth": 0, "unaccounted": 0, "growth_mb": 10}
REFUSED = (429, 503)


@dataclass
class Tally:
    """What became of requests."""

    ends: Counter[str] = field(default_factory=Counter)
    refusals: Counter[int] = field(default_factory=Counter)
    kills: int = 0

    @property
    def done(self) -> int:
        """Requests that have ended, one way or another."""
        return self.ends.total()


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    redis, tally = OwnRedis(), Tally()
    redis.start()
    with ExitStack() as stack:
        stack.callback(redis.stop)
        settings = {"QUEUE": "redis", "REDIS_URL": redis.url, "MAX_BATCH_SIZE": str(BATCH)}
        gateway = start_sleeping("service", SLEEP_S, settings)
        stack.callback(end, gateway)
        workers = [start_sleeping("worker", SLEEP_S, settings) for _ in range(WORKERS)]
        stack.callback(_end_all, workers)
        port = port_of(gateway)
        asyncio.run(_ask_all(port, Tally(), REQUESTS // 10))  # buffers, pools and tables grow to their size
        before = _counts(port)
        resident_mb = _resident_mb(gateway)
        started = time.perf_counter()
        asyncio.run(_wreak(port, tally, redis, workers, settings))
        seconds = time.perf_counter() - started
        _until_empty(port)
        after, grown_mb = _counts(port), _resident_mb(gateway) - resident_mb
    counts = {name: after[name] - before[name] for name in ("accepted", "answered", "cancelled")}
    figures: dict[str, object] = {
        "requests": REQUESTS,
        "seconds": seconds,
        "ends": dict(tally.ends),
        "refusals": {str(status): count for status, count in tally.refusals.items()},
        "workers_killed": tally.kills,
        "redis_gone_s": REDIS_GONE_S,
        "lost": tally.ends["lost"],
        "wrong": tally.ends["wrong"],
        "failed": tally.ends["failed"],
        "counts": counts,
        "unaccounted": counts["accepted"] - counts["answered"] - counts["cancelled"],
        "queue_depth": after["queue_depth"],
        "growth_mb": grown_mb,
        "wanted": WANTED,
    }
    print(f"{REQUESTS} requests in {seconds:.0f} s, {tally.kills} workers killed, Redis gone for {REDIS_GONE_S:g} s:")
    print(f"  {dict(tally.ends)}, refused and asked again {dict(tally.refusals)}")
    print(f"  {counts}, queue depth {after['queue_depth']:.0f}, the gateway grew by {grown_mb:.1f} MB")
    return figures


def _end_all(processes: Iterable[subprocess.Popen[str]]) -> None:
    for process in processes:
        end(process)


async def _wreak(
    port: int, tally: Tally, redis: OwnRedis, workers: list[subprocess.Popen[str]], settings: dict[str, str]
) -> None:
    """All requests, and meanwhile what goes wrong."""
    beside = [
        asyncio.create_task(_kill_workers(tally, workers, settings)),
        asyncio.create_task(_stop_redis(tally, redis)),
    ]
    await _ask_all(port, tally, REQUESTS)
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)


async def _kill_workers(tally: Tally, workers: list[subprocess.Popen[str]], settings: dict[str, str]) -> None:
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        victim = workers.pop(0)
        victim.kill()
        victim.wait()
        tally.kills += 1
        workers.append(start_sleeping("worker", SLEEP_S, settings))


async def _stop_redis(tally: Tally, redis: OwnRedis) -> None:
    while tally.done < REQUESTS // 3:
        await asyncio.sleep(0.1)
    redis.stop(signal.SIGKILL)
    await asyncio.sleep(REDIS_GONE_S)
    redis.start()


# --- clients


async def _ask_all(port: int, tally: Tally, count: int) -> None:
    numbers = iter(range(count))
    await asyncio.gather(*(_client(port, tally, numbers, seed) for seed in range(CLIENTS)))


async def _client(port: int, tally: Tally, numbers: Iterator[int], seed: int) -> None:
    """Request after request, each until it is accepted, on connections that stay as long as they can."""
    draw = random.Random(seed)
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    for number in numbers:
        leaves_after_s = draw.uniform(0, PATIENCE_S) if draw.random() < LEAVING else None
        connection, ended = await _request(port, tally, connection, number, leaves_after_s)
        tally.ends[ended] += 1
    if connection is not None:
        connection[1].close()


async def _request(
    port: int,
    tally: Tally,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None,
    number: int,
    leaves_after_s: float | None,
) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None, str]:
    """The connection, where it can be used again, and what became of the request."""
    request = _classify(number)
    within_s = ANSWER_WITHIN_S if leaves_after_s is None else leaves_after_s
    while True:
        reader, writer = connection or await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        try:
            head, body = await asyncio.wait_for(read_answer(reader), within_s)
        except TimeoutError:
            writer.close()
            return None, "lost" if leaves_after_s is None else "left"
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return None, "lost"
        connection = (reader, writer)
        if b"connection: close" in head.lower():
            writer.close()
            connection = None
        status = status_of(head)
        if status not in REFUSED:
            return connection, _judge(status, head, body, number)
        tally.refusals[status] += 1
        found = re.search(rb"retry-after: (\d+)", head, re.I)
        if found is None:
            return connection, "failed"
        await asyncio.sleep(int(found[1]))


def _judge(status: int, head: bytes, body: bytes, number: int) -> str:
    if status != 200:
        return "failed"
    mine = (
        f"x-request-id: chaos-{number}\r\n".encode() in head.lower() and json.loads(body)["index"] == number % CLASSES
    )
    return "answered" if mine else "wrong"


def _classify(number: int) -> bytes:
    pixels = np.full((32, 32, 3), number % CLASSES, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    image = file.getvalue()
    head = (
        f"POST /classify?defense=none HTTP/1.1\r\nHost: chaos\r\nContent-Type: image/png\r\n"
        f"X-Request-Id: chaos-{number}\r\nContent-Length: {len(image)}\r\n\r\n"
    )
    return head.encode() + image


# --- facts


def _counts(port: int) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    found = re.findall(r"^clarifier_(\w+)(?:\{.*\})? (\S+)$", page, re.M)
    wanted = {"accepted": "accepted_total", "answered": "answered_total", "cancelled": "cancelled_total"}
    wanted["queue_depth"] = "queue_depth"
    return {name: sum(float(value) for metric, value in found if metric == key) for name, key in wanted.items()}


def _until_empty(port: int, within_s: float = 30.0) -> None:
    ends = time.monotonic() + within_s
    while _counts(port)["queue_depth"] and time.monotonic() < ends:
        time.sleep(0.5)


def _resident_mb(process: subprocess.Popen[str]) -> float:
    return float(psutil.Process(process.pid).memory_info().rss / 1e6)
