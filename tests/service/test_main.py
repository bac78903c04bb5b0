"""Whole processes: misconfiguration, signals, exit codes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest

from service.__main__ import worst_case_bytes
from service.app import decoder_threads
from service.cache import MAX_CACHE_BYTES
from service.images import BYTES_PER_DECODED_PIXEL
from tests.service.conftest import Running, running, until
from tests.service.fakes import ENTERED, FATAL_VALUE, FakeBundle, green, marked, png

ROOT = Path(__file__).parents[2]
GOOD = png(green())


def run_service(**environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m service`, which is expected to end by itself."""
    env = os.environ | environment
    command = [sys.executable, "-m", "service"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLARIFIER_MAX_BATCHSIZE", "3"),
        ("CLARIFIER_DEVICE", "cuda:77"),
        ("CLARIFIER_MODEL_REPOSITORY", "no/such/place"),
        ("CLARIFIER_API_KEYS_FILE", "no/such/keys.toml"),
        ("CLARIFIER_API_KEYS_FILE", ""),  # not the same as unset, which opens the service to everybody
        ("CLARIFIER_RATE_LIMIT", "600"),
    ],
)
def test_rows_60_and_79_a_wrong_setting_ends_the_start_in_one_line_that_names_it(name: str, value: str) -> None:
    ended = run_service(**{name: value})
    assert ended.returncode == 2
    assert name in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_row_79_a_port_that_is_taken_ends_the_start_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run_service(CLARIFIER_PORT=str(taken.getsockname()[1]))
    assert ended.returncode == 2
    assert "CLARIFIER_PORT" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@contextmanager
def process(
    delay_s: float, *, wait_for: str = "/readyz", enter: str = "", **environment: str
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A service of its own with a fake bundle whose batches take `delay_s`, once it answers 200 to `wait_for`.

    First of all it writes its number into the file `enter`.
    """
    env = os.environ | {"FAKE_DELAY_S": str(delay_s), "PYTHONUNBUFFERED": "1"} | environment
    command = [sys.executable, "-m", "tests.service.fakes"]
    if enter:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', enter, *command]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            port = int(started.stdout.readline())
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                until(lambda: is_good(client, wait_for), 60)
                yield started, client
        finally:
            started.kill()


def is_good(client: httpx.Client, probe: str) -> bool:
    try:
        return client.get(probe).status_code == 200
    except httpx.TransportError:
        return False


def test_row_76_sigterm_answers_what_was_accepted_and_exits_0() -> None:
    with process(delay_s=3) as (started, client), ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(client.post, "/classify?defense=none", content=GOOD)]
        assert started.stdout is not None
        until_line(started.stdout, ENTERED)
        answers += [clients.submit(client.post, "/classify?defense=none", content=GOOD) for _ in range(3)]
        until(lambda: "clarifier_queue_depth 3" in client.get("/metrics").text)
        started.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert started.wait(30) == 0


def test_row_76_during_the_drain_delay_the_service_is_not_ready_but_answers() -> None:
    with process(delay_s=0, CLARIFIER_DRAIN_DELAY_S="3") as (started, client):
        started.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        assert client.post("/classify", content=GOOD).status_code == 200
        assert started.wait(30) == 0


def test_row_76_a_second_sigterm_exits_at_once() -> None:
    with process(delay_s=60) as (started, client), ThreadPoolExecutor(1) as clients:
        lost = clients.submit(client.post, "/classify", content=GOOD)
        assert started.stdout is not None
        until_line(started.stdout, ENTERED)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert started.poll() is None
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 128 + signal.SIGTERM
        assert isinstance(lost.exception(20), httpx.TransportError)


def test_row_53_a_process_whose_engine_has_ended_exits_to_be_started_again() -> None:
    with process(delay_s=0) as (started, client):
        response = client.post("/classify?defense=none", content=png(marked(FATAL_VALUE)))
        assert response.status_code in (500, 503)
        assert started.wait(30) == 70


def test_what_outlasts_the_drain_time_is_answered_503() -> None:
    environment = {"CLARIFIER_DRAIN_TIMEOUT_S": "0.5"}
    with process(delay_s=60, **environment) as (started, client), ThreadPoolExecutor(1) as clients:
        late = clients.submit(client.post, "/classify", content=GOOD)
        assert started.stdout is not None
        until_line(started.stdout, ENTERED)
        started.send_signal(signal.SIGTERM)
        answer = late.result(20)
        assert (answer.status_code, answer.json()["code"]) == (503, "draining")
        assert started.wait(30) == 0  # although the batch goes on for a minute


def test_row_76_sigterm_ends_a_service_that_still_loads() -> None:
    with process(delay_s=0, wait_for="/livez", FAKE_LOAD_S="60") as (started, client):
        assert not is_good(client, "/readyz")
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0


def until_line(stream: IO[str], wanted: str) -> None:
    """Read what the process prints until it prints `wanted`."""
    assert any(line.strip() == wanted for line in stream)


def test_the_worst_case_of_the_banner_is_the_sum_of_the_limits(service: Running) -> None:
    small = worst_case_bytes(service.gateway)
    assert small > service.gateway.uploads.limit + BYTES_PER_DECODED_PIXEL * 40_000_000
    with running(FakeBundle(), max_image_pixels=41_000_000) as more_pixels:
        grown = worst_case_bytes(more_pixels.gateway) - small
    assert grown == decoder_threads() * BYTES_PER_DECODED_PIXEL * 1_000_000
    with running(FakeBundle(), cache_ttl_s=1.0) as caching:
        assert worst_case_bytes(caching.gateway) - small == MAX_CACHE_BYTES
