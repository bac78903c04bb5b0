"""Classifiers with known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.bundle import Bundle
from models.classifiers import Classifier
from models.manifest import ClassifierSpec, Defenses, Manifest


def linear_classifier(weight: Tensor, bias: Tensor) -> Classifier:
    """Logits W x + b of flattened images: weight (K, D), bias (K,)."""
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return Classifier({"pool": nn.Flatten(), "head": head}).eval()


def color_classifier() -> Classifier:
    """Three classes: the channel whose mean is largest."""
    return Classifier({"pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "head": nn.Identity()}).eval()


def smooth_classifier(classes: int = 3) -> Classifier:
    """A small random network without kinks, for images of any size; its weights do not depend on the global seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Tanh())
        pool = nn.Sequential(nn.Conv2d(12, 12, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return Classifier({"stem": stem, "pool": pool, "head": nn.Linear(48, classes)}).eval()


def weight_of(network: nn.Module, name: str) -> Tensor:
    """A weight or buffer by its dotted name, without its history."""
    weight: Tensor = network.state_dict()[name]
    return weight.detach()


@dataclass(frozen=True)
class LinearProblem:
    """Two classes, and images that all have the same distance to the other class, `margin` in the l-inf norm."""

    classifier: Classifier
    images: Tensor
    labels: Tensor
    margin: float


def linear_problem(count: int = 8, side: int = 4, margin: float = 0.05) -> LinearProblem:
    """Images far from 0 and 1, half of them on each side of the plane w (x - 1/2) = 0.

    A step of t along sign(w) changes w x by t |w|_1, and no step of that size in the l-inf norm changes it more: so
    the distance to the plane is |w (x - 1/2)| / |w|_1.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3 * side * side, generator=generator)
    labels = torch.arange(count) % 2
    near = 0.5 + 0.1 * (torch.rand(count, w.numel(), generator=generator) - 0.5)
    distances = (near - 0.5) @ w / w.abs().sum()
    images = near + (margin * (2 * labels - 1) - distances)[:, None] * w.sign()
    classifier = linear_classifier(
        torch.stack([torch.zeros_like(w), w]), torch.stack([torch.tensor(0.0), -w.sum() / 2])
    )
    return LinearProblem(classifier, images.view(count, 3, side, side), labels, margin)


def bare_bundle(classifier: Classifier, classes: Sequence[str], side: int) -> Bundle:
    """A bundle that offers no defense."""
    manifest = Manifest(
        name="plain",
        version="1",
        classes=tuple(classes),
        input_size=(side, side),
        classifier=ClassifierSpec(architecture="none"),
        defenses=Defenses(),
        default_defense="none",
    )
    return Bundle(manifest, classifier)
