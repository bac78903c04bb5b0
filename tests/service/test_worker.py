"""The worker's process: how it starts, is asked, and ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.connections import MAX_HEAD_BYTES
from tests.service import own_redis
from tests.service.conftest import until
from tests.service.fakes import marked, png
from tests.service.farm import Farm, classify, ready
from tests.service.own_redis import FATAL_VALUE
from tests.service.test_connections import read, status_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not own_redis.is_installed(), reason=own_redis.MISSING)


def test_a_worker_that_is_told_to_end_answers_what_it_has(farm: Farm) -> None:
    server = farm.gateway()
    first = farm.worker(delay_s=0.2, max_batch_size=2)
    ready(server)
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(classify, server) for _ in range(8)]
        until(lambda: farm.taken() >= 1)
        farm.worker(max_batch_size=2)
        first.terminate()
        assert {answer.result().status_code for answer in answers} == {200}
    assert first.wait(20) == 0


def test_its_probes_tell_what_is_true(farm: Farm, capfd: pytest.CaptureFixture[str]) -> None:
    port = own_redis.free_port()
    worker = farm.worker(worker_port=port)
    until(lambda: status(port, "/readyz") == 200)
    assert status(port, "/livez") == 200
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'clarifier_model_info{device="cpu",digest="eee' in page
    assert "clarifier_redis_up 1.0" in page
    farm.redis.kill()
    until(lambda: status(port, "/readyz") == 503)
    assert status(port, "/livez") == 200
    worker.terminate()
    assert worker.wait(20) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_its_probes_cut_off_a_head_without_an_end(farm: Farm) -> None:
    port = own_redis.free_port()
    farm.worker(worker_port=port, body_timeout_s=1)
    until(lambda: status(port, "/livez") == 200)
    begun = b"GET /livez HTTP/1.1\r\nX-A: "
    for head, refusal in ((begun, 408), (begun + b"a" * 2 * MAX_HEAD_BYTES, 431)):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head)
            assert status_of(read(connection)) == refusal
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'clarifier_rejected_total{reason="head_too_slow"} 1.0' in page


def test_it_ends_with_70_if_its_engine_does(farm: Farm) -> None:
    server = farm.gateway(request_timeout_ms=3000)
    worker = farm.worker()
    ready(server)
    assert classify(server, png(marked(FATAL_VALUE))).status_code == 500
    assert worker.wait(20) == 70


@pytest.mark.parametrize(
    ("name", "value"),
    [("MODEL_REPOSITORY", "nowhere"), ("DEVICE", "cuda:77"), ("REDIS_URL", "http://there"), ("WORKERPORT", "1")],
)
def test_row_79_a_wrong_setting_ends_the_start_in_one_line_that_names_it(name: str, value: str) -> None:
    environment = {**os.environ, f"CLARIFIER_{name}": value}
    line = [sys.executable, "-m", "service.worker"]
    ended = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"CLARIFIER_{name}")


def status(port: int, path: str) -> int:
    """Of a probe; 0 while nobody listens."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}").status_code
    except httpx.TransportError:
        return 0
