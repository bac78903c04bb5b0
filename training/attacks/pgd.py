"""The one loop of projected gradient ascent, and the two attacks that training uses.

`model` maps images in [0, 1] to logits. Whatever an attack maximizes comes in as the gradient of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gradients import input_gradient
from training.attacks.threats import Linf, Threat

Model = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], Tensor]
"""Of what the attacker wants to be large, with respect to the images (N, 3, H, W), image by image."""


def cross_entropy(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of every image, (N,); `labels` are classes (N,) or probabilities (N, K)."""
    return F.cross_entropy(model(images).float(), labels, reduction="none")


def loss_gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy with respect to that image; no weight receives one."""
    return input_gradient(lambda images: cross_entropy(model, images, labels), images)


def ascend(
    gradient: Gradient, start: Tensor, images: Tensor, threat: Threat, *, steps: int, step_size: float
) -> Tensor:
    """`steps` projected steps up the gradient, from `start`; the last iterate."""
    moved = start
    for _ in range(steps):
        moved = threat.project(threat.move(moved, gradient(moved), step_size), images)
    return moved


def noisy_fgsm(
    model: Model, images: Tensor, labels: Tensor, *, eps: float, noise: float, generator: torch.Generator
) -> Tensor:
    """One signed step of `eps` from uniform noise of `noise` times `eps`; only clipped to [0, 1], never projected.

    N-FGSM (de Jorge et al., 2022), Algorithm 1: to train on, not an attack within a budget. Without noise it is FGSM
    (Goodfellow et al., 2015).
    """
    drawn = (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device)
    noisy = images + noise * eps * drawn
    return (noisy + eps * loss_gradient(model, noisy, labels).sign()).clamp(0, 1)


def pgd_linf(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Projected gradient ascent of the cross-entropy from a uniform random start (Madry et al., 2018)."""
    threat = Linf(eps)
    start = threat.start(images, generator)
    return ascend(lambda x: loss_gradient(model, x, labels), start, images, threat, steps=steps, step_size=step_size)
