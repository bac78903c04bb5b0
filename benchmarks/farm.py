"""A Redis of one's own, and gateways and workers whose engine sleeps instead of computing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sleeping(role: str, seconds: float, settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process of `benchmarks.sleeper`: `service` or `worker`, each batch of which takes `seconds`."""
    process = start_sleeping(role, seconds, settings)
    try:
        yield process
    finally:
        end(process)


def start_sleeping(role: str, seconds: float, settings: dict[str, str]) -> subprocess.Popen[str]:
    """The same, for whoever ends it; it writes where its service is to `stdout`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CLARIFIER_")}
    environment |= {f"CLARIFIER_{name}": value for name, value in settings.items()}
    environment |= {"CLARIFIER_PORT": "0", "SLEEP_S": str(seconds), "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "benchmarks.sleeper", role]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, and wait until it has."""
    process.terminate()
    process.wait(60)
    if process.stdout is not None:
        process.stdout.close()


class OwnRedis:
    """A Redis on a free port that keeps nothing on disk: whoever stops it loses what it had."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port: int = listener.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `CLARIFIER_REDIS_URL`."""
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Raises FileNotFoundError where there is none to start."""
        line = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(line, stdout=subprocess.DEVNULL)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal; nothing happens if it does not run."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


@contextmanager
def own_redis() -> Iterator[str]:
    """The URL of a Redis that runs meanwhile."""
    redis = OwnRedis()
    redis.start()
    try:
        yield redis.url
    finally:
        redis.stop()
