"""A job of 5,000 images whose worker is killed twice: it ends complete, each image once.

The engine sleeps. Each image has drawn a seed of its own when it came, which its answer names. Beside it: how long the
upload takes, the gateway's resident memory at its peak, and how long others wait for an answer while the job runs.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from contextlib import ExitStack

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.client import port_of
from benchmarks.farm import own_redis, sleeping

IMAGES = 5000
BATCH = 32
SLEEP_S = 0.1
"""Of a batch."""
KILLED_AT = (1000, 3000)
"""Images done."""
WANTED = {"answers": IMAGES, "failed": 0, "gateway_resident_mb": 250}


def run() -> dict[str, object]:
    """Measure, print, and return the figures."""
    settings = {"QUEUE": "redis", "MAX_BATCH_SIZE": str(BATCH)}
    with own_redis() as url, ExitStack() as stack:
        settings["REDIS_URL"] = url
        gateway = stack.enter_context(sleeping("service", SLEEP_S, settings))
        workers = [stack.enter_context(sleeping("worker", SLEEP_S, settings))]
        resident = psutil.Process(gateway.pid)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port_of(gateway)}", timeout=300))
        started = time.perf_counter()
        made = client.post("/jobs?defense=none&top_k=1", files=[_image(number) for number in range(IMAGES)])
        made.raise_for_status()
        upload_s = time.perf_counter() - started
        place, peak_mb = made.headers["location"], resident.memory_info().rss / 1e6
        left, waits = list(KILLED_AT), list[float]()
        while (state := client.get(place).json())["state"] != "done":
            if left and state["done"] >= left[0]:
                left.pop(0)
                workers[-1].kill()
                workers.append(stack.enter_context(sleeping("worker", SLEEP_S, settings)))
            asked = time.perf_counter()
            if client.post("/classify?defense=none", files=[("image", _image(0)[1])]).status_code == 200:
                waits.append(1000 * (time.perf_counter() - asked))
            peak_mb = max(peak_mb, resident.memory_info().rss / 1e6)
        run_s = time.perf_counter() - started - upload_s
        lines = client.get(place + "/result").text.splitlines()
        peak_mb = max(peak_mb, resident.memory_info().rss / 1e6)
    figures: dict[str, object] = {
        "images": IMAGES,
        "killed_workers": len(KILLED_AT) - len(left),
        "answers": len(lines),
        "distinct_seeds": len({json.loads(line)["seed"] for line in lines}),
        "failed": state["failed"],
        "upload_s": upload_s,
        "run_s": run_s,
        "sleeping_s": IMAGES / BATCH * SLEEP_S,
        "median_wait_of_others_ms": statistics.median(waits),
        "gateway_resident_mb": peak_mb,
        "wanted": WANTED,
    }
    print(
        f"{len(lines)} answers to {IMAGES} images, {state['failed']} failed, {figures['killed_workers']} workers killed"
    )
    print(f"upload {upload_s:.1f} s, run {run_s:.1f} s, of which {figures['sleeping_s']:.1f} s are the engine's")
    print(f"others waited {figures['median_wait_of_others_ms']:.0f} ms (median), the gateway had {peak_mb:.0f} MB")
    return figures


def _image(number: int) -> tuple[str, tuple[str, bytes]]:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return "images", (f"{number}.png", file.getvalue())
