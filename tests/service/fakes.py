"""A bundle with a known answer and no network, and the application on top of it."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.manifest import (
    AidPreset,
    AidSpec,
    AtopPreset,
    AtopSpec,
    AutoPreset,
    AutoSpec,
    BlurSpec,
    ClassifierSpec,
    Defenses,
    InpainterSpec,
    Manifest,
    ZeroPurPreset,
    ZeroPurSpec,
)
from service.app import Loaded
from service.engine import Engine
from service.repository import Catalog
from service.settings import Settings
from service.work import Pixels

SIDE = 8
CLASSES = ("red", "green", "blue")
NAN_VALUE = 1
"""An image whose first sample is this makes the fake answer NaN."""
NAN_SCORE_VALUE = 4
"""An image whose first sample is this makes the fake score NaN, and nothing else."""
POISON_VALUE = 2
"""An image whose first sample is this makes the whole batch raise."""
ENTERED = "a batch runs"
"""What the fake process prints then."""
FATAL_VALUE = 3
"""An image whose first sample is this ends the engine thread."""


def fake_manifest(name: str = "colors", version: str = "1", *, aid: bool = True, auto: bool = False) -> Manifest:
    """Three colors at 8 × 8, every defense."""
    rt3 = AtopPreset(transform="rt3", working_size=SIDE, sigma=0.25, cells_per_side=4)
    rt1 = AtopPreset(transform="rt1", working_size=SIDE, sigma=0.0, cells_per_side=4)
    gate = AutoPreset(strong="zeropur", threshold=0.2, false_positive_rate=0.01)
    coarse = ZeroPurPreset(blur=BlurSpec(kind="median", size=3), fine_steps=0)
    return Manifest(
        name=name,
        version=version,
        classes=CLASSES,
        input_size=(SIDE, SIDE),
        classifier=ClassifierSpec(architecture="none"),
        defenses=Defenses(
            atop=AtopSpec(
                inpainter=InpainterSpec(architecture="unet", width=1),
                default_preset="rt3",
                presets={"rt3": rt3, "rt1": rt1},
            ),
            aid=AidSpec(taps=("a", "b"), presets={"code": AidPreset()}) if aid else None,
            zeropur=ZeroPurSpec(default_preset="coarse", presets={"coarse": coarse}),
            auto=AutoSpec(default_preset="zeropur", presets={"zeropur": gate}) if auto else None,
        ),
        default_defense="atop",
    )


class FakeBundle:
    """The class is the brightest channel; `atop` adds seeded noise, other defenses turn images upside down.

    The AID score is an image's mean. `gate` holds batches while it is cleared; `batches` lists their sizes.
    """

    def __init__(self, manifest: Manifest | None = None) -> None:
        self.manifest = manifest or fake_manifest()
        self.digest = "d" * 64
        self.report: dict[str, object] = {"undefended": {"standard": {"accuracy": 1.0}}}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.delay_s = 0.0
        self.announces = False

    def probabilities(
        self, defense: str, images: Tensor, votes: int = 1, seed: int | Sequence[int] | None = None
    ) -> Tensor:
        """(N, 3): softmax of ten times the mean of each channel, of the purified image."""
        self._begin(images)
        purified = self._purified(defense, images, seed)
        probabilities = torch.softmax(10 * purified.mean((2, 3)), 1)
        return torch.where(_marked(images, NAN_VALUE)[:, None], torch.nan, probabilities)

    def purify(
        self,
        defense: str,
        images: Tensor,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        self._begin(images)
        purified = self._purified(defense, images, seed)
        return torch.where(_marked(images, NAN_VALUE)[:, None, None, None], torch.nan, purified)

    def aid_score(self, images: Tensor) -> Tensor:
        """(N,)."""
        self._begin(images)
        return torch.where(_marked(images, NAN_SCORE_VALUE), torch.nan, images.mean((1, 2, 3)))

    def ran(self, defense: str, images: Tensor) -> list[str]:
        """`auto` takes the strong chain for dark images."""
        if defense != "auto":
            return [defense] * len(images)
        return ["zeropur" if mean < 0.2 else "none" for mean in images.mean((1, 2, 3)).tolist()]

    def _begin(self, images: Tensor) -> None:
        self.batches.append(len(images))
        self.entered.set()
        if self.announces:
            print(ENTERED, flush=True)
        self.gate.wait(20)
        time.sleep(self.delay_s)
        if _marked(images, POISON_VALUE).any():
            raise RuntimeError("poisoned")
        if _marked(images, FATAL_VALUE).any():
            raise SystemExit

    def _purified(self, defense: str, images: Tensor, seed: int | Sequence[int] | None) -> Tensor:
        if defense == "none":
            return images
        if not defense.startswith("atop"):
            return images.flip(2)
        assert isinstance(seed, Sequence)
        noise = torch.stack([_noise(one, images.shape[1:]) for one in seed])
        return (images + 0.1 * noise).clamp(0, 1)


def _noise(seed: int, shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed % 2**62))


def _marked(images: Tensor, value: int) -> Tensor:
    return (images[:, 0, 0, 0] * 255).round() == value


def green(side: int = SIDE) -> Pixels:
    """An image that is green to every defense."""
    pixels = np.full((side, side, 3), 20, np.uint8)
    pixels[..., 1] = 200
    return pixels


def marked(value: int) -> Pixels:
    """A green image that makes the fake misbehave."""
    pixels = green()
    pixels[0, 0, 0] = value
    return pixels


def encoded(pixels: NDArray[np.generic], kind: str, **options: Any) -> bytes:
    """`pixels` as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png(pixels: NDArray[np.generic]) -> bytes:
    """`pixels` as a PNG."""
    return encoded(pixels, "PNG")


def loaded(*bundles: FakeBundle) -> Loaded:
    """What loading would give for `bundles`."""
    by_name = {f"{bundle.manifest.name}@{bundle.manifest.version}": bundle for bundle in bundles}
    return Loaded(Catalog(by_name), Engine(by_name, torch.device("cpu")).run, "torch", "cpu", lambda: 0.0)


def serve_fake() -> None:
    """`python -m service` with a fake bundle, on a free port that is printed: for tests of a process."""
    from service.__main__ import serve

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    bundle = FakeBundle()
    bundle.delay_s = float(os.environ["FAKE_DELAY_S"])
    bundle.announces = True

    def load(_: Settings) -> Loaded:
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
        return loaded(bundle)

    serve(Settings(default_model="colors"), listener, load)


if __name__ == "__main__":
    serve_fake()
