"""The service against the same defense called offline, in one run on one machine.

1. One request at a time, warm: the median latency of `none`, `atop` and `zeropur`.
2. 64 keep-alive clients with `atop`: requests per second, as a ratio to the same defense called without a service
   in batches of `MAX_BATCH_SIZE`; once as a script calls it, once with freed memory kept as the service keeps it. And
   the 99th percentile of how long they took, as a ratio to how long such a batch takes and waits for company.
   Offline and serving rounds alternate, so that a machine that gets slower or faster meanwhile does so for all; each
   figure is the median of its rounds.

The service, the load generator and the offline callers are processes of their own; while one is measured the others
are idle.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from urllib.request import urlopen

import torch

from benchmarks.client import BUNDLE, classify, photo, read_status, resident_mb, service
from models import Bundle, load_bundle
from service.allocator import keep_freed_memory
from service.settings import Settings

CLIENTS = 64
ROUNDS = 7
ROUND_S = 5.0
WARM_S = 1.5
SINGLE_REQUESTS = {"none": 200, "atop": 60, "zeropur": 12}
SIDES = ("offline", "offline_kept", "clarifier")
WANTED_RATIO = 0.95
WANTED_P99 = 2.0
WANTED_RESIDENT_MB = 1200


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    image = photo(load_bundle(BUNDLE).manifest.input_size)
    with service() as port:
        latency = {name: _latency_ms(port, image, name, count) for name, count in SINGLE_REQUESTS.items()}
        rounds = [_round(port, image) for _ in range(ROUNDS)]
        resident = resident_mb(port)
    rates = {side: statistics.median(each[side] for each in rounds) for side in SIDES}
    ratios = {side: [each["clarifier"] / each[side] for each in rounds] for side in ("offline", "offline_kept")}
    ratio, ratio_kept = (statistics.median(found) for found in ratios.values())
    batch_size, delay_ms = _default("max_batch_size"), _default("max_queue_delay_ms")
    p99 = [each["p99_ms"] / (1000 * batch_size / each["offline"] + delay_ms) for each in rounds]
    for name, milliseconds in latency.items():
        print(f"one request at a time, {name}: p50 {milliseconds:.1f} ms")
    print(f"atop, {CLIENTS} clients: {rates['clarifier']:.1f} requests/s")
    print(f"  offline {rates['offline']:.1f} images/s: ratio {_spread(ratios['offline'])}")
    print(f"  offline, freed memory kept {rates['offline_kept']:.1f} images/s: ratio {_spread(ratios['offline_kept'])}")
    print(f"  99th percentile of their times, to that of a batch: {_spread(p99)}")
    print(f"the service with the shipped bundles, after all this: {resident:.0f} MB resident")
    return {
        "latency_p50_ms": latency,
        "throughput": rates,
        "ratio": ratio,
        "ratio_to_offline_kept": ratio_kept,
        "wanted_ratio": WANTED_RATIO,
        "p99_to_batch_time": statistics.median(p99),
        "wanted_p99_to_batch_time": WANTED_P99,
        "resident_mb": resident,
        "wanted_resident_mb": WANTED_RESIDENT_MB,
        "rounds": rounds,
        "clients": CLIENTS,
        "batch_size": int(batch_size),
    }


def _round(port: int, image: bytes) -> dict[str, float]:
    offline, kept = _apart("offline"), _apart("offline_kept")
    return {**offline, **kept, **_served(port, image)}


def _default(setting: str) -> float:
    return float(Settings.model_fields[setting].default)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


# --- offline


def _offline() -> float:
    """Images per second of `atop` in batches of MAX_BATCH_SIZE, called from here."""
    bundle = load_bundle(BUNDLE)
    size = int(_default("max_batch_size"))
    images = torch.rand(size, 3, *bundle.manifest.input_size, generator=torch.Generator().manual_seed(0))
    _offline_images(bundle, images, WARM_S)
    done, seconds = _offline_images(bundle, images, ROUND_S)
    return done / seconds


def _offline_images(bundle: Bundle, images: torch.Tensor, seconds: float) -> tuple[int, float]:
    started = time.perf_counter()
    done = 0
    while time.perf_counter() - started < seconds:
        seeds = list(range(done, done + len(images)))
        bundle.probabilities("atop", images, seed=seeds)
        done += len(images)
    return done, time.perf_counter() - started


# --- served


def _latency_ms(port: int, image: bytes, defense: str, count: int) -> float:
    """Median milliseconds of one client that sends one request after the other."""
    return asyncio.run(_median_latency_ms(port, classify(image, defense), count))


async def _median_latency_ms(port: int, request: bytes, count: int) -> float:
    """Of `count` requests, after a tenth as many that warm the path."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(max(3, count // 10)):
        await _ask(reader, writer, request)
    latencies_s = list[float]()
    for _ in range(count):
        begun = time.perf_counter()
        await _ask(reader, writer, request)
        latencies_s.append(time.perf_counter() - begun)
    writer.close()
    await writer.wait_closed()
    return 1000 * statistics.median(latencies_s)


def _served(port: int, image: bytes) -> dict[str, float]:
    """Requests per second of CLIENTS keep-alive clients with `atop`, and the 99th percentile of their times."""
    found = _apart("clarifier", str(port), image=image)
    with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        assert answer.status == 200
    return found


async def _steady(port: int, request: bytes) -> dict[str, float]:
    """Answers per second of CLIENTS clients in a closed loop, of the ROUND_S seconds after WARM_S, and their times.

    The rate is the sum of the clients' own rates, each from its first to its last answer in that time: whether a batch
    ends just before or just after it makes no difference. All go on until the time is over, so that no batch is half
    empty.
    """
    answered_at = [list[float]() for _ in range(CLIENTS)]

    async def client(times: list[float]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                await _ask(reader, writer, request)
                times.append(time.perf_counter())
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        started = time.perf_counter() + WARM_S
        clients = [group.create_task(client(times)) for times in answered_at]
        await asyncio.sleep(WARM_S + ROUND_S)
        for task in clients:
            task.cancel()
    counted = [[at for at in times if at >= started] for times in answered_at]
    took_s = [later - earlier for times in counted for earlier, later in pairwise(times)]
    return {
        "clarifier": sum((len(times) - 1) / (times[-1] - times[0]) for times in counted),
        "p99_ms": 1000 * statistics.quantiles(took_s, n=100)[98],
    }


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    """One request and its answer. Raises RuntimeError for any status but 200."""
    writer.write(request)
    status = await read_status(reader)
    if status != 200:
        raise RuntimeError(f"an answer was {status}")


def _generate(port: int, image: bytes) -> dict[str, float]:
    """The load generator."""
    import uvloop

    return uvloop.run(_steady(port, classify(image, "atop")))


# --- processes of their own


def _apart(side: str, *arguments: str, image: bytes = b"") -> dict[str, float]:
    """What this module measures when it is run for `side`."""
    command = [sys.executable, "-m", "benchmarks.throughput", side, *arguments]
    return dict(json.loads(subprocess.run(command, input=image, stdout=subprocess.PIPE, check=True).stdout))


def _main(side: str, *arguments: str) -> None:
    match side:
        case "offline":
            print(json.dumps({side: _offline()}))
        case "offline_kept":
            keep_freed_memory()
            print(json.dumps({side: _offline()}))
        case "clarifier":
            print(json.dumps(_generate(int(arguments[0]), sys.stdin.buffer.read())))


if __name__ == "__main__":
    _main(*sys.argv[1:])
