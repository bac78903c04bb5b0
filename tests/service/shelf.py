"""A model repository of fakes: what stands in a bundle's directory decides how it loads; and processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from service.engine import Engine
from service.loading import Host, Loaded, load_into
from service.repository import renew_repository
from service.settings import Settings, load_settings
from tests.service.fakes import FakeBundle
from tests.service.manifests import CLASSES, fake_manifest

ROOT = Path(__file__).parents[2]
DAMAGED, HUGE, COLD, SLOW = "damaged", "huge", "cold", "slow"
"""Files beside a bundle: its hashes are wrong; it is more than memory holds; it fails when it is first run; it takes
until the file is gone."""
LOG = "log.txt"


class ShelfBundle(FakeBundle):
    """A fake whose classes are turned by `turn`: what is green is green, blue, or red."""

    def __init__(self, path: Path) -> None:
        super().__init__(fake_manifest(path.parent.name, path.name))
        self.digest = digest_of(path)
        self.turn = int((path / "bundle.json").read_text())
        self.cold = (path / COLD).exists()
        self.delay_s = float(os.environ.get("FAKE_DELAY_S", "0"))

    def probabilities(
        self,
        defense: str,
        images: Tensor,
        votes: int = 1,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, 3)."""
        return super().probabilities(defense, images, votes, seed, ran).roll(self.turn, 1)


def place(root: Path, turn: int = 0, *files: str, version: str = "1", name: str = "colors") -> Path:
    """Put a bundle there, or another one in its place; its directory."""
    path = root / name / version
    path.mkdir(parents=True, exist_ok=True)
    for file in (DAMAGED, HUGE, COLD, SLOW):
        (path / file).touch() if file in files else (path / file).unlink(missing_ok=True)
    (path / "bundle.json").write_text(str(turn))
    return path


def digest_of(path: Path) -> str:
    """What `check_bundle` gives."""
    if (path / DAMAGED).exists():
        raise ValueError("weights.safetensors: its sha256 is not the one that bundle.json states")
    return hashlib.sha256(f"{path.parent.name} {path.name} {(path / 'bundle.json').read_text()}".encode()).hexdigest()


def label_of(turn: int) -> str:
    """Of a green image."""
    return CLASSES[(1 + turn) % 3]


def load_shelf(settings: Settings, log: list[str] | None = None) -> Loaded:
    """What `load_engine` does; `log` lists what was loaded and what was warmed."""
    happened = [] if log is None else log

    def load(path: Path) -> ShelfBundle:
        happened.append(f"load {path.parent.name}@{path.name}")
        bundle = ShelfBundle(path)
        end = time.monotonic() + 60
        while (path / SLOW).exists() and time.monotonic() < end:
            (path / "loading").touch()
            time.sleep(0.01)
        if (path / HUGE).exists():
            raise MemoryError
        return bundle

    def warm(name: str, bundle: ShelfBundle) -> None:
        happened.append(f"warm {name}")
        if bundle.cold:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    renew = partial(renew_repository, settings.model_repository, load, digest_of, warm, settings.max_image_pixels)
    host: Host[ShelfBundle] = Engine({}, torch.device("cpu"))
    return load_into(host, renew, engine="torch", device="cpu")


@contextmanager
def shelf_process(kind: str, repository: Path, **settings: object) -> Iterator[subprocess.Popen[str]]:
    """`python -m service` (gateway) or `python -m service.worker` (worker) with a repository of fakes.

    A gateway prints its port.
    """
    given = {name if name.isupper() else f"CLARIFIER_{name.upper()}": str(value) for name, value in settings.items()}
    usual = {"CLARIFIER_MODEL_REPOSITORY": str(repository), "CLARIFIER_DEFAULT_MODEL": "colors"}
    environment = os.environ | usual | given | {"PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "tests.service.shelf", kind]
    with (
        (repository / LOG).open("w") as log,
        subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=log) as started,
    ):
        try:
            yield started
        finally:
            started.kill()


class Log:
    """What the process around a repository says on standard error."""

    def __init__(self, repository: Path) -> None:
        self._path = repository / LOG

    def count(self, text: str) -> int:
        """How many lines hold `text`."""
        return sum(text in line for line in self._path.read_text().splitlines())


def hang_up(process: subprocess.Popen[str]) -> None:
    """SIGHUP."""
    process.send_signal(signal.SIGHUP)


def main() -> None:
    """A process."""
    import asyncio
    import socket

    from service.__main__ import serve
    from service.logs import configure_logging
    from service.worker import work

    configure_logging("INFO", "text")
    if sys.argv[1] == "worker":
        sys.exit(asyncio.run(work(load_settings(), load_shelf)))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    serve(load_settings(), listener, load_shelf)


if __name__ == "__main__":
    main()
