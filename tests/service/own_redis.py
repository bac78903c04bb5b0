"""A real Redis of one's own, and workers without a network, in processes that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis

from service.loading import Loaded
from service.repository import Catalog
from service.settings import load_settings
from service.work import Answer, Classified, Detected, Key, Operation, Pixels, Purified, Ran
from tests.service.manifests import CLASSES, fake_manifest

DEADLY_VALUE = 9
"""An image whose first sample is this ends its worker's process, as SIGKILL does."""
SLOW_VALUE = 10
"""An image whose first sample is this takes three seconds."""
FATAL_VALUE = 11
"""An image whose first sample is this ends its worker's engine."""
MISSING = "redis-server is not installed (on Debian: apt install redis-server)"


def is_installed() -> bool:
    """Whether there is a Redis to start."""
    return shutil.which("redis-server") is not None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class OwnRedis:
    """A Redis on a free port that keeps nothing on disk, so that a restart forgets everything."""

    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """For looking into it."""
        return redis.Redis(port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        line = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        line += ["--repl-diskless-load", "on-empty-db"]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < end, "redis-server does not answer"
                time.sleep(0.02)

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class EchoBundle:
    """A description without a network."""

    digest: str = "e" * 64
    manifest = fake_manifest()
    report: dict[str, object] = field(default_factory=dict)


class EchoEngine:
    """Answers with the image's brightest channel; some images are deadly, some slow. No torch."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.batches: list[int] = []

    def run(self, key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> Ran:
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(len(images))
        time.sleep(3 if SLOW_VALUE in values else self.delay_s)
        if FATAL_VALUE in values:
            raise SystemExit
        if DEADLY_VALUE in values:
            os.kill(os.getpid(), signal.SIGKILL)
        return Ran([_answer(key, image) for image in images], {"classify": 1.0})


def _answer(key: Key, image: Pixels) -> Answer:
    if key.operation is Operation.DETECT:
        return Detected(float(image.mean()) / 255)
    if key.operation is Operation.PURIFY:
        return Purified((image / 255).astype(np.float32), 0.0)
    means = image.reshape(-1, 3).mean(0)
    probabilities = (np.arange(len(CLASSES)) == means.argmax()).astype(np.float32)
    return Classified(probabilities, probabilities if key.explain else None, 0.5 if key.explain else None)


def loaded_echo(engine: EchoEngine) -> Loaded:
    """What loading gives a worker that echoes."""
    return Loaded(Catalog({"colors@1": EchoBundle()}), engine.run, "echo", "cpu", lambda: 0.0)


def start_worker(url: str, *, delay_s: float = 0.0, **settings: object) -> subprocess.Popen[bytes]:
    """A worker in a process of its own."""
    given = {f"CLARIFIER_{name.upper()}": str(value) for name, value in settings.items()}
    environment = {**os.environ, **given, "CLARIFIER_REDIS_URL": url, "ECHO_DELAY_S": str(delay_s)}
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-m", "tests.service.own_redis"], env=environment, cwd=root)


def main() -> None:
    """A worker that echoes."""
    import asyncio

    from service.logs import configure_logging
    from service.worker import work

    engine = EchoEngine(float(os.environ["ECHO_DELAY_S"]))
    configure_logging("WARNING", "text")
    sys.exit(asyncio.run(work(load_settings(), lambda _: loaded_echo(engine))))


if __name__ == "__main__":
    main()
