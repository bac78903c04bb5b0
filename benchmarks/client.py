"""What benchmarks of the service share: a service of its own, requests, answers."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image

BUNDLE = Path("models/bundles/cifar10/1")


@contextmanager
def service(**settings: str) -> Iterator[int]:
    """`python -m service` with its defaults but for `settings`, ready, on a free port; that port."""
    with serving(**settings) as (port, _):
        yield port


@contextmanager
def serving(**settings: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The same, with its process."""
    # A port of 0 is answered by the line that says where the documentation is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLARIFIER_")}
    environment |= {
        "CLARIFIER_PORT": "0",
        "CLARIFIER_MODEL_REPOSITORY": str(BUNDLE.parent.parent),
        "CLARIFIER_DEFAULT_MODEL": f"{BUNDLE.parent.name}@{BUNDLE.name}",
        "CLARIFIER_DEVICE": "cpu",
        "PYTHONUNBUFFERED": "1",
        **{f"CLARIFIER_{name.upper()}": value for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield port_of(process), process
        finally:
            process.terminate()
            process.wait(60)


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that a service announces when it is ready. Raises RuntimeError if it ends instead."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/models", line)
        if found:
            return int(found[1])
    raise RuntimeError("the service did not start")


def resident_mb(port: int) -> float:
    """What the process that answers on `port` says of its resident memory."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    found = re.search(r"^process_resident_memory_bytes (\S+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1]) / 1e6


def photo(input_size: tuple[int, int]) -> bytes:
    """A PNG of the model's size: the service's own costs then weigh the most."""
    pixels = np.random.default_rng(0).integers(0, 256, (*input_size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def classify(image: bytes, defense: str) -> bytes:
    """A request as it goes over the wire, on a connection that stays."""
    head = (
        f"POST /classify?defense={defense} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(image)}\r\n\r\n"
    )
    return head.encode() + image


async def read_status(reader: asyncio.StreamReader) -> int:
    """The status of one answer, read to its end."""
    head, _ = await read_answer(reader)
    return status_of(head)


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one answer, by its Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    start = head.lower().index(b"content-length:") + 15
    return head, await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))


def status_of(head: bytes) -> int:
    """The status that an answer begins with."""
    return int(head.split(b" ", 2)[1])
