"""ZeroPur against the procedure as it was published, on the same bundle, batch and threads, in one run.

As published, each step recomputes the features of the received and of the coarse image for every layer, by whole
forward passes. Ours computes them once, ends each pass at the last layer that is needed, and takes gradients of
images only; single images run on packed convolutions (`models.packed`) and recorded operators (`models.recorded`), the
published procedure on plain ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import load_bundle
from models.blur import blur
from models.classifiers import Classifier
from models.manifest import ZeroPurPreset

BUNDLE = Path("models/bundles/cifar10/1")
BATCH_SIZES = (1, 32)
REPEATS = 3


def run() -> dict[str, object]:
    """Seconds of both, their ratio, and the share of pixels on which they differ, for each batch size."""
    bundle, unrecorded = load_bundle(BUNDLE), load_bundle(BUNDLE)
    bundle.record()
    spec = bundle.manifest.defenses.zeropur
    assert spec is not None, "the benchmark needs a bundle with ZeroPur"
    preset = spec.presets["code"]
    results = dict[str, object]()
    for batch_size in BATCH_SIZES:
        images = torch.rand(batch_size, 3, *bundle.input_size, generator=torch.Generator().manual_seed(0))
        contenders = {
            "ours": partial(bundle.purify, "zeropur:code", images),
            "as published": partial(as_published, bundle.classifier, images, preset),
        }
        if batch_size == 1:  # others are never recorded
            contenders["unrecorded"] = partial(unrecorded.purify, "zeropur:code", images)
        purified = {name: purify() for name, purify in contenders.items()}
        best = in_turn(contenders)
        differing = float(((purified["ours"] - purified["as published"]).abs() > 1e-6).float().mean())
        speedup = best["as published"] / best["ours"]
        results[f"batch_{batch_size}"] = {
            "seconds": {name: round(seconds, 4) for name, seconds in best.items()},
            "speedup": round(speedup, 2),
            "pixels_that_differ": round(differing, 5),
        }
        print(f"zeropur, batch {batch_size}: {speedup:.2f} x as fast as published ({best['ours']:.3f} s)")
    return results


def in_turn(contenders: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The best time of each, run in turn, so that a drifting machine slows all of them."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(REPEATS):
        for name, purify in contenders.items():
            began = time.perf_counter()
            purify()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def as_published(classifier: Classifier, received: Tensor, preset: ZeroPurPreset) -> Tensor:
    """Algorithms 1 and 2, every feature by a whole forward pass whenever it is mentioned."""

    def features(images: Tensor, name: str) -> Tensor:
        return classifier.features(images, [name, classifier.feature_names[-1]])[0]

    def project(images: Tensor) -> Tensor:
        inside = torch.minimum(torch.maximum(images, received - preset.eps), received + preset.eps)
        return inside.clamp(0, 1)

    shifted, velocity = received, torch.zeros_like(received)
    for _ in range(preset.coarse_steps):
        shifted = shifted.detach().requires_grad_()
        target = features(blur(shifted, preset.blur), "pool").detach()
        similarity = F.cosine_similarity(features(shifted, "pool"), target).sum()
        (gradient,) = torch.autograd.grad(similarity, shifted)
        norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        velocity = gradient / norm + preset.momentum * velocity
        shifted = project(shifted.detach() + preset.coarse_step_size * velocity.sign())
    aligned = received
    for _ in range(preset.fine_steps):
        aligned = aligned.detach().requires_grad_()
        loss = torch.zeros(())
        for name in preset.fine_layers:
            original, coarse = features(received, name).detach(), features(shifted, name).detach()
            loss = loss - ((features(aligned, name) - original) * (coarse - original)).sum()
        (gradient,) = torch.autograd.grad(loss, aligned)
        aligned = project(aligned.detach() - preset.fine_step_size * gradient.sign())
    return aligned
