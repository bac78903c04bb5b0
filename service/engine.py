"""Loaded bundles on a device: a batch of images in, an answer for each out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.manifest import Manifest
from models.stages import timed_stages
from service.errors import ClarifierError, NotFinite
from service.tokens import TokenBucket
from service.work import Answer, Classified, Detected, EngineFault, Floats, Key, Operation, Pixels, Purified, Ran

logger = logging.getLogger(__name__)


class DeviceUnavailable(ValueError):
    """The configured device is not there; the message names the setting."""


class LoadedBundle(Protocol):
    """What an engine needs of `models.Bundle`."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def digest(self) -> str: ...

    def probabilities(
        self,
        defense: str,
        images: Tensor,
        votes: int = 1,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, K)."""

    def purify(
        self,
        defense: str,
        images: Tensor,
        seed: int | Sequence[int] | None = None,
        ran: Sequence[str] | None = None,
    ) -> Tensor:
        """(N, 3, H, W)."""

    def aid_score(self, images: Tensor) -> Tensor:
        """(N,)."""

    def ran(self, defense: str, images: Tensor) -> list[str]:
        """The chain that `auto` chooses for each image."""


NOTHING: Mapping[str, LoadedBundle] = {}


class Engine:
    """Runs batches on `device`. `bundles` maps `name@version` to a bundle that is there already.

    `strong` has a token for each run of a strong chain that `auto` may choose; without it, as many as it likes.
    """

    def __init__(
        self, bundles: Mapping[str, LoadedBundle], device: torch.device, strong: TokenBucket | None = None
    ) -> None:
        self.device = device
        self._strong = strong
        self.hold(bundles)

    def hold(self, bundles: Mapping[str, LoadedBundle], before: Mapping[str, LoadedBundle] = NOTHING) -> None:
        """From the next batch on run `bundles`, and no others but those `before` them that a key's digest tells apart.

        Any thread may call it.
        """
        self._generations = (dict(bundles), dict(before))

    def run(self, key: Key, images: Sequence[Pixels | Floats], seeds: Sequence[int]) -> Ran:
        """An outcome per image, in order; NotFinite in the place of one that holds a NaN or an infinity.

        Raises EngineFault when the device fails, and whatever a defense raises.
        """
        try:
            return self._run(key, self._on_device(images), seeds)
        except torch.OutOfMemoryError as error:
            raise EngineFault("oom") from error
        except torch.AcceleratorError as error:
            raise EngineFault("cuda") from error

    def warm(self, batch_sizes: Sequence[int]) -> None:
        """Run every preset on one image, default ones at every batch size, so that no client pays for first times."""
        for name, bundle in self._generations[0].items():
            started = time.monotonic()
            for key, sizes in _first_times(name, bundle.manifest, batch_sizes):
                for size in sizes:
                    self.run(key, [np.zeros((*bundle.manifest.input_size, 3), np.uint8)] * size, [0] * size)
            logger.info("%s is warm on %s after %.1f s", name, self.device, time.monotonic() - started)

    def memory_bytes(self) -> int:
        """Allocated on an accelerator; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def give_back(self) -> None:
        """Hand freed memory of an accelerator back to it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _find(self, key: Key) -> LoadedBundle:
        for bundles in self._generations:
            bundle = bundles.get(key.model)
            if bundle is not None and key.digest in ("", bundle.digest):
                return bundle
        raise LookupError(f"{key.model} ({key.digest:.12}) is not loaded")

    def _on_device(self, images: Sequence[Pixels | Floats]) -> Tensor:
        """(H, W, 3) each, all uint8 or all float32 in [0, 1], to float32 (N, 3, H, W) in [0, 1]."""
        stacked = torch.from_numpy(np.stack(images)).to(self.device)
        floats = stacked.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return floats if stacked.is_floating_point() else floats / 255

    def _run(self, key: Key, images: Tensor, seeds: Sequence[int]) -> Ran:
        bundle = self._find(key)
        started = time.monotonic()
        purified: Tensor | None = None
        stage_ms = dict[str, float]()
        ran, degraded = self._choose(bundle, key, images)
        if _is_purified_apart(key):
            with timed_stages() as parts:
                purified = bundle.purify(key.defense, images, seed=seeds, ran=ran)
            self._wait_for_device()
            stage_ms |= {part: 1000 * seconds for part, seconds in parts.items()}
            stage_ms["purify"] = 1000 * (time.monotonic() - started - sum(parts.values()))
            started = time.monotonic()
        match key.operation:
            case Operation.PURIFY:
                assert purified is not None
                return Ran(_purified(images, purified, degraded), stage_ms)
            case Operation.DETECT:
                outcomes = _detect(bundle, images)
            case Operation.CLASSIFY:
                outcomes = _classify(bundle, key, images, purified, seeds, ran, degraded)
        stage_ms["classify"] = 1000 * (time.monotonic() - started)
        return Ran(outcomes, stage_ms)

    def _choose(self, bundle: LoadedBundle, key: Key, images: Tensor) -> tuple[Sequence[str] | None, Sequence[bool]]:
        """The chain that `auto` runs for each image, None for any other defense; and which images are degraded to the
        cheap one. Every vote is a run of its own.
        """
        gate = bundle.manifest.gate(key.defense)
        if gate is None:
            return None, [False] * len(images)
        chosen = bundle.ran(key.defense, images)
        if self._strong is None:
            return chosen, [False] * len(images)
        degraded = [chain == gate.strong and not self._strong.take(key.votes) for chain in chosen]
        return [gate.cheap if less else chain for chain, less in zip(chosen, degraded, strict=True)], degraded

    def _wait_for_device(self) -> None:
        """Let queued kernels end, so that a stage's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _is_purified_apart(key: Key) -> bool:
    """Whether purification is a call of its own. Several votes are the bundle's: it draws and averages them."""
    if key.operation is Operation.CLASSIFY:
        return key.defense != "none" and key.votes == 1
    return key.operation is Operation.PURIFY


def _classify(
    bundle: LoadedBundle,
    key: Key,
    images: Tensor,
    purified: Tensor | None,
    seeds: Sequence[int],
    ran: Sequence[str] | None,
    degraded: Sequence[bool],
) -> list[Answer | ClarifierError]:
    """`purified` is None where nothing is purified or each vote is; `ran` where the defense is not `auto`."""
    if purified is None:
        probabilities = _on_host(bundle.probabilities(key.defense, images, votes=key.votes, seed=seeds, ran=ran))
    else:
        probabilities = _on_host(bundle.probabilities("none", purified, votes=1, seed=seeds))
    nothing: Sequence[None] = [None] * len(images)
    bare: Floats | None = None
    scores: Floats | None = None
    if key.explain:
        bare = probabilities if key.defense == "none" else _on_host(bundle.probabilities("none", images, seed=seeds))
        if bundle.manifest.aid_threshold is not None:
            scores = _on_host(bundle.aid_score(images))
    judged = _pictures(images if purified is None else purified) if key.purified else None
    distances = None if purified is None else _distances(images, purified)
    parts = zip(
        _finite(probabilities, bare, scores, judged),
        probabilities,
        nothing if bare is None else bare,
        nothing if scores is None else scores.tolist(),
        ran or nothing,
        nothing if judged is None else judged,
        degraded,
        nothing if distances is None else distances,
        strict=True,
    )
    return [Classified(*part) if finite else NotFinite() for finite, *part in parts]


def _detect(bundle: LoadedBundle, images: Tensor) -> list[Answer | ClarifierError]:
    scores = _on_host(bundle.aid_score(images))
    return [
        Detected(score) if finite else NotFinite()
        for score, finite in zip(scores.tolist(), _finite(scores), strict=True)
    ]


def _purified(images: Tensor, purified: Tensor, degraded: Sequence[bool]) -> list[Answer | ClarifierError]:
    """The purified images on the host, each with its distance to what it was."""
    pictures = _pictures(purified)
    parts = zip(_finite(pictures), pictures, _distances(images, purified), degraded, strict=True)
    return [Purified(*part) if finite else NotFinite() for finite, *part in parts]


def _distances(images: Tensor, purified: Tensor) -> list[float]:
    """(N, 3, H, W) twice: the L-infinity distance of each image to what it was."""
    distances: list[float] = _on_host((purified - images).abs().flatten(1).amax(1)).tolist()
    return distances


def _pictures(images: Tensor) -> Floats:
    """(N, 3, H, W) on the device to (N, H, W, 3) on the host."""
    return np.ascontiguousarray(_on_host(images).transpose(0, 2, 3, 1))


def _finite(*parts: Floats | None) -> list[bool]:
    """For each image, whether all numbers of `parts`, (N, ...) each, are finite."""
    sound = [np.isfinite(part).reshape(len(part), -1).all(1) for part in parts if part is not None]
    finite: list[bool] = np.logical_and.reduce(sound).tolist()
    return finite


def _on_host(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().float().cpu().numpy()
    return array


def _first_times(name: str, manifest: Manifest, batch_sizes: Sequence[int]) -> list[tuple[Key, Sequence[int]]]:
    """What a client can ask of a bundle with one defense, or its default chain, and the batch sizes to try it at."""
    offered = manifest.defenses.offered()
    usual = dict.fromkeys(["none", *offered, manifest.resolve(manifest.default_defense)], batch_sizes)
    presets = [manifest.resolve(f"{defense}:{preset}") for defense, spec in offered.items() for preset in spec.presets]
    defenses = dict.fromkeys(presets, (1,)) | usual
    runs = [(Key(Operation.CLASSIFY, name, defense), sizes) for defense, sizes in defenses.items()]
    if manifest.aid_threshold is not None:
        runs.append((Key(Operation.DETECT, name), batch_sizes))
    return runs


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises DeviceUnavailable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"CLARIFIER_DEVICE is {name}, but there is no such CUDA device")
    return device
