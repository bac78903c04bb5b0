"""The service against the same defense called offline, in one run on one machine.

1. One request at a time, warm: the median latency of `none`, `atop` and `zeropur`.
2. 64 keep-alive clients with `atop`: requests per second, as a ratio to the same defense called without a service
   in batches of `MAX_BATCH_SIZE`; once as a script calls it, once with freed memory kept as the service keeps it.
   Offline and serving rounds alternate, so that a machine that gets slower or faster meanwhile does so for all; each
   figure is the median of its rounds.

The service, the load generator and the offline callers are processes of their own; while one is measured the others
are idle.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
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
WANTED_RATIO = 0.9
WANTED_RESIDENT_MB = 1200


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    image = photo(load_bundle(BUNDLE).manifest.input_size)
    with service() as port:
        latency = {name: _latency_ms(port, image, name, count) for name, count in SINGLE_REQUESTS.items()}
        rounds = [
            {"offline": _apart("offline"), "offline_kept": _apart("offline_kept"), "clarifier": _served(port, image)}
            for _ in range(ROUNDS)
        ]
        resident = resident_mb(port)
    rates = {side: statistics.median(each[side] for each in rounds) for side in rounds[0]}
    ratios = {side: [each["clarifier"] / each[side] for each in rounds] for side in ("offline", "offline_kept")}
    ratio, ratio_kept = (statistics.median(found) for found in ratios.values())
    for name, milliseconds in latency.items():
        print(f"one request at a time, {name}: p50 {milliseconds:.1f} ms")
    print(f"atop, {CLIENTS} clients: {rates['clarifier']:.1f} requests/s")
    print(f"  offline {rates['offline']:.1f} images/s: ratio {_spread(ratios['offline'])}")
    print(f"  offline, freed memory kept {rates['offline_kept']:.1f} images/s: ratio {_spread(ratios['offline_kept'])}")
    print(f"the service with the shipped bundles, after all this: {resident:.0f} MB resident")
    return {
        "latency_p50_ms": latency,
        "throughput": rates,
        "ratio": ratio,
        "ratio_to_offline_kept": ratio_kept,
        "wanted_ratio": WANTED_RATIO,
        "resident_mb": resident,
        "wanted_resident_mb": WANTED_RESIDENT_MB,
        "rounds": rounds,
        "clients": CLIENTS,
        "batch_size": Settings.model_fields["max_batch_size"].default,
    }


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


# --- offline


def _offline() -> float:
    """Images per second of `atop` in batches of MAX_BATCH_SIZE, called from here."""
    bundle = load_bundle(BUNDLE)
    size = Settings.model_fields["max_batch_size"].default
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


def _served(port: int, image: bytes) -> float:
    """Requests per second of CLIENTS keep-alive clients with `atop`."""
    rate = _apart("clarifier", str(port), image=image)
    with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        assert answer.status == 200
    return rate


async def _steady_rate(port: int, request: bytes) -> float:
    """Answers per second of CLIENTS clients in a closed loop, of the ROUND_S seconds after WARM_S.

    The sum of the clients' own rates, each from its first to its last answer in that time: whether a batch ends just
    before or just after it makes no difference. All go on until the time is over, so that no batch is half empty.
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
    return sum((len(times) - 1) / (times[-1] - times[0]) for times in counted)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    """One request and its answer. Raises RuntimeError for any status but 200."""
    writer.write(request)
    status = await read_status(reader)
    if status != 200:
        raise RuntimeError(f"an answer was {status}")


def _generate(port: int, image: bytes) -> float:
    """The load generator."""
    import uvloop

    return uvloop.run(_steady_rate(port, classify(image, "atop")))


# --- processes of their own


def _apart(side: str, *arguments: str, image: bytes = b"") -> float:
    """The rate that this module measures when it is run for `side`."""
    command = [sys.executable, "-m", "benchmarks.throughput", side, *arguments]
    return float(subprocess.run(command, input=image, stdout=subprocess.PIPE, check=True).stdout)


def _main(side: str, *arguments: str) -> None:
    match side:
        case "offline":
            print(_offline())
        case "offline_kept":
            keep_freed_memory()
            print(_offline())
        case "clarifier":
            print(_generate(int(arguments[0]), sys.stdin.buffer.read()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
