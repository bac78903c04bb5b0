"""The one loop of projected gradient ascent, and the two attacks that training uses.

`model` maps images in [0, 1] to logits. Whatever an attack maximizes comes in as an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gradients import input_gradient
from training.attacks.threats import Linf, Threat

Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""At images (N, 3, H, W): the value by which iterates are ranked, (N,), and the gradient to climb, image by image."""


Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, K) and labels to what the attacker wants to be large, (N,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every image, (N,); `labels` are classes (N,) or probabilities (N, K)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def right_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of every image's own class, (N,)."""
    return logits.float().gather(1, labels[:, None]).squeeze(1)


def best_wrong_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest logit of another class, (N,)."""
    return logits.float().scatter(1, labels[:, None], -torch.inf).amax(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one, (N,): positive where the image is misclassified (Carlini & Wagner)."""
    return best_wrong_logit(logits, labels) - right_logit(logits, labels)


def differentiated(function: Callable[[Tensor], Tensor]) -> Objective:
    """The objective of a function of images to values (N,); no weight receives a gradient."""

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            values = function(images)
        return values.detach(), gradient_of(values, images)

    return at


def classified(model: Model, labels: Tensor, loss: Loss = cross_entropy) -> Objective:
    """Uphill is the loss of the model's answer, but its value is the margin: what is wrong outranks what is unsure."""

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            logits = model(images)
            losses = loss(logits, labels)
        return margin(logits.detach(), labels), gradient_of(losses, images)

    return at


def gradient_of(values: Tensor, images: Tensor) -> Tensor:
    """The gradient of each value, (N,), by its own image; zero for values that do not come from the images."""
    if not values.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(values, images, torch.ones_like(values), materialize_grads=True)
    return gradient


def loss_gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy with respect to that image; no weight receives one."""
    return input_gradient(lambda images: cross_entropy(model(images), labels), images)


def ascend(
    objective: Objective,
    start: Tensor,
    images: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    keep: Literal["last", "highest"] = "last",
) -> Tensor:
    """`steps` projected steps up the gradient, from `start`.

    Each image's last iterate, or that of its highest value: where gradients mislead, the last one is often not the
    worst for the defense. To find the highest takes one more look, at the last iterate. A value or a component of the
    gradient that is no number is passed over.
    """
    moved = best = start
    highest = torch.full((len(start),), -torch.inf, device=start.device)
    for _ in range(steps):
        value, gradient = objective(moved)
        if keep == "highest":
            best = torch.where((value > highest).view(-1, 1, 1, 1), moved, best)
            highest = torch.fmax(highest, value)
        moved = threat.project(threat.move(moved, gradient.nan_to_num(0.0, 0.0, 0.0), step_size), images)
    if keep == "last":
        return moved
    value, _ = objective(moved)
    return torch.where((value > highest).view(-1, 1, 1, 1), moved, best)


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
    objective = differentiated(lambda x: cross_entropy(model(x), labels))
    return ascend(objective, start, images, threat, steps=steps, step_size=step_size)
