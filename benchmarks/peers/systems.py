"""How each system is started: commands, settings, and which settings are tried before the better ones are kept.

Each peer is as its documentation advises: dynamic batching of at most 32 images, a millisecond for company (with 32
clients in a closed loop a longer wait is lost time), raw bytes decoded by Pillow in the handler, TorchScript with its
batch norms folded, one thread of torch a process. Where a second process, or another transport, might be faster on two
cores, both are tried. Logs are as each ships them, into a file. Clarifier has no choices: it runs with its defaults,
metrics and access log among them, and with API keys and a rate limit, which are off by default.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".peers"
SERVERS = Path(__file__).parent / "servers"
KEY = "clarifier-benchmark-key"
RATE_LIMIT = "200000/second"
"""Counted for every request, and never reached."""
MAX_BATCH_SIZE = 32
STOP_S = 20
LEFTOVERS_S = 5

Settings = Mapping[str, str]


@dataclass(frozen=True)
class System:
    """A server. `command` and `settings` are for a folder of its own and a port; of `choices` the fastest is kept."""

    name: str
    path: str
    """Of the route that takes the image."""
    command: Callable[[Path, int], list[str]]
    settings: Callable[[Path, int], Settings]
    choices: tuple[Settings, ...] = ({},)
    prepare: Callable[[Path, Path, int, Settings], None] | None = None
    """Given the model, the folder, the port and the choice, before a start."""
    form_field: str | None = None
    """Of a multipart form, where the body cannot be the image itself."""

    def request(self, photo: bytes) -> bytes:
        """What goes over the wire; the same for all but path and form. Whoever has no keys ignores the key."""
        kind, body = "image/jpeg", photo
        if self.form_field is not None:
            kind, body = _form(self.form_field, photo)
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\nContent-Type: {kind}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _form(field: str, photo: bytes) -> tuple[str, bytes]:
    """A content type, and the body of a form with one file."""
    head = f'--photo\r\nContent-Disposition: form-data; name="{field}"; filename="photo.jpg"\r\n'
    body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + photo + b"\r\n--photo--\r\n"
    return "multipart/form-data; boundary=photo", body


class Started:
    """A system that runs, with whatever processes it has started."""

    def __init__(self, system: System, process: subprocess.Popen[bytes], port: int, choice: Settings) -> None:
        self.system, self.port, self.choice = system, port, choice
        self.process = process

    def hold(self) -> None:
        """Take no processor time until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `hold`."""
        self._signal(signal.SIGCONT)

    def resident_mb(self) -> float:
        """Memory of all its processes; pages that several of them share count once."""
        return sum(process.memory_full_info().pss for process in self._processes()) / 1e6

    def end(self) -> None:
        """End it and whatever it has started."""
        self.go_on()
        processes = self._processes()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        for end in (psutil.Process.terminate, psutil.Process.kill):  # what it has left behind, and itself
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, processes = psutil.wait_procs(processes, timeout=LEFTOVERS_S)
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def started(system: System, model: Path, folder: Path, choice: Settings) -> Iterator[Started]:
    """`system` with `choice`; `folder` is its working directory and keeps what it logs."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_ports(1)[0]
    if system.prepare is not None:
        system.prepare(model, folder, port, choice)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLARIFIER_", "BENCH_"))}
    environment |= {"BENCH_MODEL": str(model), "BENCH_PORT": str(port)}
    environment |= {**system.settings(model, port), **choice}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            system.command(folder, port),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # LitServe ends its whole process group with itself
        )
    run = Started(system, process, port, choice)
    try:
        yield run
    finally:
        run.end()


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


# --- Clarifier


def _clarifier_command(_: Path, __: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.peers.tiny"]


def _clarifier_settings(model: Path, port: int) -> Settings:
    """Its defaults, and what is off by default: API keys and a rate limit."""
    keys = model / "keys.toml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(f'[[key]]\nname = "benchmark"\nsha256 = "{digest}"\nrights = ["explain", "costly"]\n')
    return {
        "PYTHONPATH": str(ROOT),
        "CLARIFIER_MODEL_REPOSITORY": str(model / "bundles"),
        "CLARIFIER_DEFAULT_MODEL": "tiny",
        "CLARIFIER_DEVICE": "cpu",
        "CLARIFIER_PORT": str(port),
        "CLARIFIER_API_KEYS_FILE": str(keys),
        "CLARIFIER_RATE_LIMIT": RATE_LIMIT,
    }


# --- the others


def _python(name: str, *arguments: str) -> Callable[[Path, int], list[str]]:
    return lambda _, __: [str(ENVIRONMENTS / name / "bin" / "python"), *arguments]


def _nothing(_: Path, __: int) -> Settings:
    return {}


def _mosec_settings(_: Path, port: int) -> Settings:
    return {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": str(port)}


def _torchserve_command(folder: Path, _: int) -> list[str]:
    start = [str(ENVIRONMENTS / "torchserve" / "bin" / "torchserve"), "--start", "--foreground", "--ncs"]
    files = ["--model-store", str(folder / "store"), "--ts-config", str(folder / "config.properties")]
    return [*start, *files, "--models", "tiny=tiny.mar", "--disable-token-auth"]


def _torchserve_settings(_: Path, __: int) -> Settings:
    binaries = ENVIRONMENTS / "torchserve" / "bin"
    return {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}


def _prepare_torchserve(model: Path, folder: Path, port: int, choice: Settings) -> None:
    """An archive of the handler and the network, and a configuration: TorchServe reads both from files."""
    (folder / "store").mkdir(exist_ok=True)
    extra = [SERVERS / "tiny_classifier.py", model / "network.pt", model / "classes.json"]
    archive = [str(ENVIRONMENTS / "torchserve" / "bin" / "torch-model-archiver"), "--model-name", "tiny", "--force"]
    archive += ["--version", "1.0", "--handler", str(SERVERS / "torchserve_handler.py")]
    archive += ["--extra-files", ",".join(map(str, extra)), "--export-path", str(folder / "store")]
    subprocess.run(archive, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = int(choice["BENCH_WORKERS"])
    tiny = {
        "defaultVersion": True,
        "marName": "tiny.mar",
        "minWorkers": workers,
        "maxWorkers": workers,
        "batchSize": MAX_BATCH_SIZE,
        "maxBatchDelay": int(choice["BENCH_DELAY_MS"]),
        "responseTimeout": 120,
    }
    others = ("management", "metrics", "grpc_inference", "grpc_management")
    ports = dict(zip(others, _free_ports(len(others)), strict=True))
    lines = [f"inference_address=http://127.0.0.1:{port}"]
    lines += [f"{name}_address=http://127.0.0.1:{ports[name]}" for name in others[:2]]
    lines += [f"{name}_port={ports[name]}" for name in others[2:]]
    lines += ["disable_system_metrics=true", "enable_envvars_config=false"]
    lines += [f"models={json.dumps({'tiny': {'1.0': tiny}})}"]
    (folder / "config.properties").write_text("\n".join(lines) + "\n")


def _bentoml_command(_: Path, port: int) -> list[str]:
    start = [str(ENVIRONMENTS / "bentoml" / "bin" / "bentoml"), "serve", "bentoml_service:Classify"]
    return [*start, "--working-dir", str(SERVERS), "--host", "127.0.0.1", "--port", str(port)]


def _bentoml_settings(_: Path, __: int) -> Settings:
    return {"BENTOML_DO_NOT_TRACK": "true"}


CLARIFIER = System("clarifier", "/classify?defense=none", _clarifier_command, _clarifier_settings)
ONE_OR_TWO_WORKERS = tuple({"BENCH_WORKERS": str(count), "BENCH_DELAY_MS": "1"} for count in (2, 1))
PEERS = (
    System(
        "mosec",
        "/inference",
        _python("mosec", str(SERVERS / "mosec_server.py")),
        _mosec_settings,
        ONE_OR_TWO_WORKERS,
    ),
    System(
        "torchserve",
        "/predictions/tiny",
        _torchserve_command,
        _torchserve_settings,
        ONE_OR_TWO_WORKERS,
        _prepare_torchserve,
    ),
    System(
        "litserve",
        "/predict",
        _python("litserve", str(SERVERS / "litserve_server.py")),
        _nothing,
        tuple({"BENCH_WORKERS": "1", "BENCH_DELAY_MS": "1", "BENCH_FAST_QUEUE": fast} for fast in "01"),
    ),
    System("bentoml", "/classify", _bentoml_command, _bentoml_settings, ONE_OR_TWO_WORKERS, form_field="images"),
    System("ray", "/classify", _python("ray", str(SERVERS / "ray_app.py")), _nothing, ONE_OR_TWO_WORKERS),
)
