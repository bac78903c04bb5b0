"""A real Prometheus with our configuration, and what it is asked."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

CONFIGURATION = Path(__file__).parent / "prometheus"
START_S = 60.0
MISSING = "prometheus is not installed (on Debian: apt install prometheus)"


def is_installed() -> bool:
    """Whether there is one to start, and its promtool."""
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    client: httpx.Client

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query: `metric` and `value`. Raises ValueError with what PromQL has against it."""
        answer = self.client.get("/api/v1/query", params={"query": expr})
        return _result(expr, answer)

    def ask_over(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """The series of a query over a time: `metric` and `values`."""
        given: dict[str, Any] = {"query": expr, "start": start, "end": end, "step": step_s}
        return _result(expr, self.client.get("/api/v1/query_range", params=given))

    def firing(self) -> set[str]:
        """Names of alerts."""
        alerts = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def _result(expr: str, answer: httpx.Response) -> list[dict[str, Any]]:
    if answer.status_code != 200:
        raise ValueError(f"{expr}: {answer.text}")
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result


@contextmanager
def running(folder: Path, targets: Mapping[str, Sequence[int]]) -> Iterator[Prometheus]:
    """Our configuration and our rules, where each job's names stand for these ports of this machine."""
    said = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text())
    port = _free_port()
    for job in said["scrape_configs"]:
        ports = targets.get(job["job_name"], [port])
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [f"127.0.0.1:{each}" for each in ports]}]
    said["rule_files"] = [str(CONFIGURATION / name) for name in said["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(said))
    line = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    line += [f"--web.listen-address=127.0.0.1:{port}"]
    with (
        subprocess.Popen(line, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        try:
            _wait(client)
            yield Prometheus(client)
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait(client: httpx.Client) -> None:
    ends = time.monotonic() + START_S
    while not _is_ready(client):
        if time.monotonic() > ends:
            raise TimeoutError("Prometheus did not start")
        time.sleep(0.1)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
