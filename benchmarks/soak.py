"""Ten minutes of everything: good images, bad ones, batches, clients that leave. What grows?

Against the shipped service with its defaults. Resident memory, open files and threads are read every few seconds;
growth is the slope of a straight line through the memory of the last two thirds, since the first third fills pools and
caches.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from benchmarks.client import BUNDLE, photo, read_answer, serving, status_of
from models import load_bundle

SOAK_S = 600.0
CLIENTS = 8
EVERY_S = 5.0
LEAVING = 0.1
WANTED = {"growth_mb_per_hour": 60, "failed": 0, "open_files_grown": 0, "threads_grown": 0}
"""An hour's growth of 60 MB is 10 MB in these ten minutes: what a straight line through them can tell from none."""


@dataclass(frozen=True)
class Ask:
    """A request as it goes over the wire, how often it comes among the others, and the statuses it may get."""

    wire: bytes
    share: int
    expected: tuple[int, ...]


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    image = photo(load_bundle(BUNDLE).manifest.input_size)
    with serving() as (port, process):
        samples, outcomes = asyncio.run(_soak(port, process, _asks(image)))
    steady = samples[len(samples) // 3 :]
    slope = statistics.linear_regression([at for at, *_ in steady], [mb for _, mb, *_ in steady]).slope
    figures: dict[str, object] = {
        "seconds": SOAK_S,
        "outcomes": dict(outcomes),
        "failed": outcomes["failed"],
        "resident_mb": [round(mb) for _, mb, *_ in samples[:: max(1, len(samples) // 20)]],
        "growth_mb_per_hour": 3600 * slope,
        "open_files_grown": steady[-1][2] - steady[0][2],
        "threads_grown": steady[-1][3] - steady[0][3],
        "wanted": WANTED,
    }
    print(f"{SOAK_S:g} s of everything: {dict(outcomes)}")
    print(
        f"  resident {steady[0][1]:.0f} to {steady[-1][1]:.0f} MB, {figures['growth_mb_per_hour']:.1f} MB an hour; ",
        end="",
    )
    print(f"open files {steady[0][2]} to {steady[-1][2]}, threads {steady[0][3]} to {steady[-1][3]}")
    return figures


def _asks(image: bytes) -> list[Ask]:
    bad = image[:-40]
    pair = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="i"\r\n\r\n' + each + b"\r\n"
        for each in (image, bad)
    )
    form = "multipart/form-data; boundary=b"
    return [
        Ask(_post("/classify?defense=none", image), 20, (200,)),
        Ask(_post("/classify?defense=atop&explain=true", image), 8, (200,)),
        Ask(_post("/purify?defense=atop", image), 4, (200,)),
        Ask(_post("/detect", image), 4, (200,)),
        Ask(_post("/classify/batch?defense=none", pair + b"--b--\r\n", form), 4, (200,)),
        Ask(_post("/purify/batch?defense=atop", pair + b"--b--\r\n", form), 2, (200,)),
        Ask(_post("/classify", bad), 4, (422,)),
        Ask(_post("/classify", b"no image at all"), 4, (415,)),
        Ask(_post("/classify?votes=1000", image), 2, (422,)),
        Ask(_post("/classify?model=unknown", image), 2, (404,)),
        Ask(_post("/v2/models/cifar10/infer", b"{", "application/json"), 2, (400,)),
        Ask(b"GET /metrics HTTP/1.1\r\nHost: soak\r\n\r\n", 2, (200,)),
        Ask(b"GET /models HTTP/1.1\r\nHost: soak\r\n\r\n", 1, (200,)),
    ]


def _post(path: str, body: bytes, kind: str = "image/png") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _soak(
    port: int, process: subprocess.Popen[str], asks: list[Ask]
) -> tuple[list[tuple[float, float, int, int]], Counter[str]]:
    """Seconds, resident megabytes, open files and threads, every EVERY_S; and what became of the requests."""
    watched, outcomes, samples = psutil.Process(process.pid), Counter[str](), list[tuple[float, float, int, int]]()
    started = time.perf_counter()
    clients = [asyncio.create_task(_client(port, asks, outcomes, seed)) for seed in range(CLIENTS)]
    while time.perf_counter() - started < SOAK_S:
        await asyncio.sleep(EVERY_S)
        resident_mb = watched.memory_info().rss / 1e6
        samples.append((time.perf_counter() - started, resident_mb, watched.num_fds(), watched.num_threads()))
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return samples, outcomes


async def _client(port: int, asks: list[Ask], outcomes: Counter[str], seed: int) -> None:
    draw = random.Random(seed)
    for ask in _drawn(asks, draw):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ask.wire)
        if draw.random() < LEAVING:
            await asyncio.sleep(draw.uniform(0, 0.1))
            outcomes["left"] += 1
        else:
            try:
                head, _ = await read_answer(reader)
                outcomes["as expected" if status_of(head) in ask.expected else "failed"] += 1
            except (OSError, asyncio.IncompleteReadError):
                outcomes["failed"] += 1
        writer.close()


def _drawn(asks: list[Ask], draw: random.Random) -> Iterator[Ask]:
    while True:
        yield from draw.choices(asks, [ask.share for ask in asks], k=64)
