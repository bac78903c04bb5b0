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

from models.manifest import Manifest
from service.engine import Engine
from service.loading import Loaded
from service.repository import Catalog
from service.settings import Settings
from service.tokens import TokenBucket
from service.work import Pixels
from tests.service.manifests import SIDE, fake_manifest

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


class FakeBundle:
    """The class is the brightest channel; `atop` adds seeded noise, other defenses turn images upside down.

    The AID score is an image's mean. `gate` holds batches while it is cleared; `batches` lists their sizes.
    Without `misbehaves` no image is marked. Of the chains that `auto` runs, `none` leaves images as they are.
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
        self.misbehaves = True

    def probabilities(
        self,
        defense: str,
        images: Tensor,
        votes: int = 1,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, 3): softmax of ten times the mean of each channel, of the purified image."""
        self._begin(images)
        purified = self._purified(defense, images, seed, ran)
        probabilities = torch.softmax(10 * purified.mean((2, 3)), 1)
        return torch.where(self._marked(images, NAN_VALUE)[:, None], torch.nan, probabilities)

    def purify(
        self,
        defense: str,
        images: Tensor,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        self._begin(images)
        purified = self._purified(defense, images, seed, ran)
        return torch.where(self._marked(images, NAN_VALUE)[:, None, None, None], torch.nan, purified)

    def aid_score(self, images: Tensor) -> Tensor:
        """(N,)."""
        self._begin(images)
        return torch.where(self._marked(images, NAN_SCORE_VALUE), torch.nan, images.mean((1, 2, 3)))

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
        if self._marked(images, POISON_VALUE).any():
            raise RuntimeError("poisoned")
        if self._marked(images, FATAL_VALUE).any():
            raise SystemExit

    def _marked(self, images: Tensor, value: int) -> Tensor:
        marked = (images[:, 0, 0, 0] * 255 - value).abs() < 1e-3  # as uploaded: noise seldom comes so near
        return marked & self.misbehaves

    def _purified(
        self, defense: str, images: Tensor, seed: int | Sequence[int] | None, ran: Sequence[str] | None = None
    ) -> Tensor:
        if ran is not None:
            strong = torch.tensor([chain != "none" for chain in ran])
            return torch.where(strong[:, None, None, None], images.flip(2), images)
        if defense == "none":
            return images
        if not defense.startswith("atop"):
            return images.flip(2)
        assert isinstance(seed, Sequence)
        noise = torch.stack([_noise(one, images.shape[1:]) for one in seed])
        return (images + 0.1 * noise).clamp(0, 1)


def _noise(seed: int, shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed % 2**62))


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


def batch(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """`images` as the form of a batch, for `files`."""
    return [("images", (f"{i}.png", image)) for i, image in enumerate(images)]


def dark() -> Pixels:
    """A green image that no fake AID finds natural."""
    pixels = np.full((SIDE, SIDE, 3), 20, np.uint8)
    pixels[: SIDE // 2, :, 1] = 60
    return pixels


def loaded(*bundles: FakeBundle, strong: TokenBucket | None = None) -> Loaded:
    """What loading would give for `bundles`."""
    by_name = {f"{bundle.manifest.name}@{bundle.manifest.version}": bundle for bundle in bundles}
    return Loaded(Catalog(by_name), Engine(by_name, torch.device("cpu"), strong).run, "torch", "cpu", lambda: 0.0)


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
