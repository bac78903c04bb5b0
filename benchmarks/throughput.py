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
import io
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

from models import Bundle, load_bundle
from service.allocator import keep_freed_memory
from service.settings import Settings

BUNDLE = Path("models/bundles/cifar10/1")
CLIENTS = 64
ROUNDS = 3
ROUND_S = 6.0
WARM_S = 1.5
SINGLE_REQUESTS = {"none": 200, "atop": 60, "zeropur": 12}
WANTED_RATIO = 0.9
START_TIMEOUT_S = 180.0


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    image = _photo(load_bundle(BUNDLE).manifest.input_size)
    with _service() as port:
        latency = {name: _latency_ms(port, image, name, count) for name, count in SINGLE_REQUESTS.items()}
        rounds = [
            {"offline": _apart("offline"), "offline_kept": _apart("offline_kept"), "clarifier": _served(port, image)}
            for _ in range(ROUNDS)
        ]
    rates = {side: statistics.median(each[side] for each in rounds) for side in rounds[0]}
    ratio, ratio_kept = (
        statistics.median(each["clarifier"] / each[side] for each in rounds) for side in ("offline", "offline_kept")
    )
    for name, milliseconds in latency.items():
        print(f"one request at a time, {name}: p50 {milliseconds:.1f} ms")
    print(f"atop, {CLIENTS} clients: {rates['served']:.1f} requests/s")
    print(f"  offline {rates['offline']:.1f} images/s: ratio {ratio:.3f}")
    print(f"  offline with freed memory kept {rates['offline_kept']:.1f} images/s: ratio {ratio_kept:.3f}")
    return {
        "latency_p50_ms": latency,
        "throughput": rates,
        "ratio": ratio,
        "ratio_to_offline_kept": ratio_kept,
        "wanted_ratio": WANTED_RATIO,
        "rounds": rounds,
        "clients": CLIENTS,
        "batch_size": Settings.model_fields["max_batch_size"].default,
    }


def _photo(input_size: tuple[int, int]) -> bytes:
    """A PNG of the model's size: the service's own costs then weigh the most."""
    pixels = np.random.default_rng(0).integers(0, 256, (*input_size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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


@contextmanager
def _service() -> Iterator[int]:
    """`python -m service` with its defaults, ready, on a free port."""
    # A port of 0 is answered by the line that says where the documentation is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLARIFIER_")}
    environment |= {
        "CLARIFIER_PORT": "0",
        "CLARIFIER_MODEL_REPOSITORY": str(BUNDLE.parent.parent),
        "CLARIFIER_DEFAULT_MODEL": f"{BUNDLE.parent.name}@{BUNDLE.name}",
        "CLARIFIER_DEVICE": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield _port_of(process)
        finally:
            process.terminate()
            process.wait(60)


def _port_of(process: subprocess.Popen[str]) -> int:
    """The port that a service announces when it is ready. Raises RuntimeError if it ends instead."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/models", line)
        if found:
            return int(found[1])
    raise RuntimeError("the service did not start")


def _latency_ms(port: int, image: bytes, defense: str, count: int) -> float:
    """Median milliseconds of one client that sends one request after the other."""
    asyncio.run(_load(port, _request(image, defense), clients=1, seconds=0.0, requests=max(3, count // 10)))
    measured = asyncio.run(_load(port, _request(image, defense), clients=1, seconds=0.0, requests=count))
    return 1000 * float(statistics.median(measured["latencies_s"]))


def _served(port: int, image: bytes) -> float:
    """Requests per second of CLIENTS keep-alive clients with `atop`."""
    rate = _apart("clarifier", str(port), image=image)
    with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        assert answer.status == 200
    return rate


def _request(image: bytes, defense: str) -> bytes:
    head = (
        f"POST /classify?defense={defense} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(image)}\r\n\r\n"
    )
    return head.encode() + image


async def _load(port: int, request: bytes, *, clients: int, seconds: float, requests: int) -> dict[str, Any]:
    """Closed loop: each client sends its next request when it has its answer, until both limits are reached."""
    latencies = list[float]()
    started = time.perf_counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - started < seconds or len(latencies) < requests:
            begun = time.perf_counter()
            writer.write(request)
            await _read_answer(reader)
            latencies.append(time.perf_counter() - begun)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.perf_counter() - started
    return {"requests_per_s": len(latencies) / elapsed, "latencies_s": latencies}


async def _read_answer(reader: asyncio.StreamReader) -> None:
    """One answer, by its Content-Length. Raises RuntimeError for anything but 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode("latin-1"))
    start = head.lower().index(b"content-length:") + 15
    await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))


def _generate(port: int, image: bytes) -> float:
    """The load generator: warm the path, then measure."""
    import uvloop

    request = _request(image, "atop")
    uvloop.run(_load(port, request, clients=CLIENTS, seconds=WARM_S, requests=0))
    measured = uvloop.run(_load(port, request, clients=CLIENTS, seconds=ROUND_S, requests=0))
    return float(measured["requests_per_s"])


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
