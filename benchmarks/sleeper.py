"""An engine that sleeps instead of computing, in a gateway of its own or in a worker: what is left is the way to it.

Its answer is the class that the image's first sample names, so that whoever asks can tell whose answer it is.

`python -m benchmarks.sleeper service` and `python -m benchmarks.sleeper worker` read the service's settings, and
SLEEP_S, from the environment.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.client import BUNDLE
from models.manifest import Manifest
from service.__main__ import serve
from service.loading import Loaded
from service.repository import Catalog
from service.settings import load_settings
from service.work import Classified, Key, Pixels, Ran
from service.worker import work


@dataclass(frozen=True)
class Described:
    """The shipped bundle without its networks."""

    manifest: Manifest
    digest: str = "0" * 64
    report: dict[str, object] | None = None


def sleeper(seconds: float) -> Loaded:
    """A bundle every batch of which takes `seconds`."""
    manifest = Manifest.model_validate_json((BUNDLE / "bundle.json").read_text())
    classes = np.eye(len(manifest.classes), dtype=np.float32)

    def run(key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> Ran:
        time.sleep(seconds)
        return Ran([Classified(classes[int(image[0, 0, 0]) % len(classes)]) for image in images])

    bundle = Described(manifest, report={})
    return Loaded(Catalog({f"{manifest.name}@{manifest.version}": bundle}), run, "sleeper", "cpu", lambda: 0.0)  # type: ignore[dict-item]


def main() -> None:
    """Serve, or work, until a signal."""
    settings, loaded = load_settings(), sleeper(float(os.environ["SLEEP_S"]))
    if sys.argv[1] == "worker":
        sys.exit(asyncio.run(work(settings, lambda _: loaded)))
    listener = socket.socket()
    listener.bind((settings.host, settings.port))
    serve(settings, listener, lambda _: loaded)


if __name__ == "__main__":
    main()
