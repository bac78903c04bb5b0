"""docker-compose.yml, read without an engine, and what of it can be run without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import check_jsonschema
import httpx
import jsonschema
import pytest
import redis
import yaml

from service.settings import PREFIX, Settings
from tests.service import own_redis
from tests.service.conftest import until
from tests.test_dockerfile import STAGES, environment, said

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
SERVING = [name for name in OURS if "environment" in SERVICES[name]]
MOUNTED = [
    volume.split(":")[:2] for service in SERVICES.values() for volume in service.get("volumes", ()) if volume[0] == "."
]
"""Files of ours, and where they are in a container."""
PASSWORDS = "/run/clarifier"


def test_it_is_as_the_specification_says() -> None:
    schemas = Path(check_jsonschema.__file__).parent / "builtin_schemas/vendor"
    jsonschema.validate(COMPOSE, json.loads((schemas / "compose-spec.json").read_text()))


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours_is_built_from_the_dockerfile_and_runs_a_module(name: str) -> None:
    service = SERVICES[name]
    target = service["build"]["target"]
    assert target in STAGES
    assert service["image"] == f"clarifier:{target}"
    module = service.get("command", json.loads(said(target, "CMD")[-1]))[0]
    assert find_spec(module)


@pytest.mark.parametrize("name", SERVING)
def test_every_name_of_the_environment_is_a_setting(name: str) -> None:
    given = SERVICES[name]["environment"]
    assert all(key.startswith(PREFIX) for key in given)
    fields = {key.removeprefix(PREFIX).lower(): value for key, value in given.items()}
    fields["redis_password_file"] = None  # it is where the volume is
    assert Settings.model_validate(fields).redis_address.startswith("redis://redis:6379/")
    assert given[f"{PREFIX}REDIS_PASSWORD_FILE"] == f"{PASSWORDS}/redis_password"


@pytest.mark.parametrize("name", [name for name in SERVING if "worker" in name])
def test_a_worker_answers_where_its_health_is_looked_at(name: str) -> None:
    port = SERVICES[name]["environment"][f"{PREFIX}WORKER_PORT"]
    assert said(SERVICES[name]["build"]["target"], "EXPOSE") == [str(port)]


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_floating_writable_or_boundless(name: str) -> None:
    service = SERVICES[name]
    image, _, tag = service["image"].partition(":")
    assert tag not in ("", "latest")
    assert image == "clarifier" or tag.count(".") >= 2
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["pids_limit"] > 0
    assert "mem_limit" in service or name == "training"
    assert service["logging"]["options"]["max-size"]
    assert "container_name" not in service


@pytest.mark.parametrize(("ours", "there"), MOUNTED)
def test_what_is_mounted_is_there(ours: str, there: str) -> None:
    assert (ROOT / ours).is_dir()
    assert there.startswith("/etc/")


def test_only_the_gateway_and_the_dashboards_are_reached_and_only_from_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"gateway": [f"127.0.0.1:8000:{said('cpu', 'EXPOSE')[0]}"], "grafana": ["127.0.0.1:3000:3000"]}
    assert COMPOSE["networks"]["inside"]["internal"]


def test_without_a_profile_everything_starts_that_others_wait_for() -> None:
    at_once = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert at_once == {"gateway", "worker", "redis", "passwords", "prometheus", "grafana"}
    assert all(set(service.get("depends_on", {})) <= at_once for service in SERVICES.values())


def test_a_worker_may_end_before_it_is_killed() -> None:
    drain_s = Settings().drain_delay_s + Settings().drain_timeout_s
    assert all(float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain_s + 5 for name in SERVING)


def draw(folder: Path) -> str:
    """Run the service `passwords` on `folder`; the password that is there afterwards."""
    service = SERVICES["passwords"]
    (script,) = service["command"]
    line = [*service["entrypoint"], script.replace("$$", "$").replace("/run/grafana", str(folder))]
    assert service["working_dir"] == PASSWORDS
    subprocess.run(line, cwd=folder, check=True, timeout=20)
    return (folder / "redis_password").read_text().strip()


def test_a_password_is_drawn_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    drawn = draw(tmp_path / "a")
    assert len(bytes.fromhex(drawn)) == 32
    assert draw(tmp_path / "a") == drawn
    assert draw(tmp_path / "b") != drawn


@dataclass
class Site:
    """The services of the file as processes: their addresses and folders are this machine's."""

    folder: Path
    redis_port: int
    stack: ExitStack

    @classmethod
    def started(cls, folder: Path, stack: ExitStack) -> Site:
        """With passwords that were drawn, and a Redis that begins."""
        draw(folder)
        site = cls(folder, own_redis.free_port(), stack)
        line = [site.here(word) for word in SERVICES["redis"]["command"]]
        line[2:2] = ["--port", str(site.redis_port), "--bind", "127.0.0.1", "--dir", str(folder)]
        site.start(line)
        return site

    def here(self, text: str) -> str:
        return text.replace("redis://redis:6379", f"redis://127.0.0.1:{self.redis_port}").replace(
            PASSWORDS, str(self.folder)
        )

    def start(self, line: list[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        known = {**os.environ, **(environment or {})}
        process = self.stack.enter_context(subprocess.Popen(line, cwd=ROOT, env=known, stdout=subprocess.DEVNULL))
        self.stack.callback(process.terminate)
        return process

    def start_ours(self, name: str) -> tuple[subprocess.Popen[bytes], int]:
        """Start one of our images' services; the port that stands for that of its health check."""
        service, port = SERVICES[name], own_redis.free_port()
        target = service["build"]["target"]
        command = service.get("command", json.loads(said(target, "CMD")[-1]))
        given = {**environment(target), **service["environment"], f"{PREFIX}HOST": "127.0.0.1"}
        given[f"{PREFIX}WORKER_PORT" if f"{PREFIX}WORKER_PORT" in given else f"{PREFIX}PORT"] = port
        ours = {key: self.here(str(value)) for key, value in given.items() if key.startswith(PREFIX)}
        return self.start([sys.executable, "-m", *command], ours), port

    def is_healthy(self, name: str, port: int) -> bool:
        """What the image's HEALTHCHECK says."""
        (check,) = said(SERVICES[name]["build"]["target"], "HEALTHCHECK")
        _, *line = json.loads(check.partition(" CMD ")[2].replace(":8000", f":{port}"))
        return subprocess.run([sys.executable, *line], capture_output=True, check=False).returncode == 0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Its Redis runs."""
    if not own_redis.is_installed():
        pytest.skip(own_redis.MISSING)
    with ExitStack() as stack:
        started = Site.started(tmp_path, stack)
        until(lambda: is_up(started.redis_port))
        yield started


def is_up(port: int) -> bool:
    try:
        redis.Redis(port=port).ping()
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False
    return True


def test_redis_asks_for_that_password_and_evicts_nothing(site: Site) -> None:
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=site.redis_port).ping()
    password = (site.folder / "redis_password").read_text().strip()
    inside = redis.Redis(port=site.redis_port, password=password)
    assert inside.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    check = site.here(SERVICES["redis"]["healthcheck"]["test"][1].replace("$$", "$"))
    here = check.replace("redis-cli ", f"redis-cli -p {site.redis_port} ")
    assert subprocess.run(["sh", "-c", here], check=False).returncode == 0
    inside.config_set("requirepass", "another")
    assert subprocess.run(["sh", "-c", here], capture_output=True, check=False).returncode != 0


@pytest.mark.slow
def test_its_gateway_and_its_worker_answer_and_end_as_they_should(site: Site) -> None:
    gateway, port = site.start_ours("gateway")
    until(lambda: is_alive(port), 60)
    assert not site.is_healthy("gateway", port)  # nobody works yet
    worker, worker_port = site.start_ours("worker")
    until(lambda: site.is_healthy("worker", worker_port), 300)
    until(lambda: site.is_healthy("gateway", port), 60)
    photo = (ROOT / "examples/cat.jpg").read_bytes()
    answer = httpx.post(f"http://127.0.0.1:{port}/classify", files={"image": photo}, timeout=60)
    assert (answer.status_code, answer.json()["label"]) == (200, "cat")
    for process in (gateway, worker):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def is_alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    except httpx.TransportError:
        return False
