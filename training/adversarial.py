"""Adversarial training of a classifier: what one step minimizes, for each method.

Targets are probabilities (N, K). Attacks see the classifier as it trains, normalized by the batch's own statistics, as
in the single-step papers; the running ones lag behind while weights move fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.manifest import Fraction, Strict
from training.attacks.pgd import Model, ascend, differentiated, noisy_fgsm, pgd_linf
from training.attacks.threats import Linf


class NoisyFgsmTraining(Strict):
    """Train on one FGSM step from uniform noise, without projection (N-FGSM, de Jorge et al., 2022)."""

    method: Literal["n-fgsm"]
    eps: PositiveFloat = 8 / 255
    """Radius of the ball; here also the size of the step."""
    noise: NonNegativeFloat = 2.0
    """Half the width of the noise, in units of `eps`; with less than about 1 the training may collapse."""


class PgdSteps(Strict):
    """What attacks of several steps in the l-inf ball share."""

    eps: PositiveFloat = 8 / 255
    step_size: PositiveFloat = 2 / 255
    steps: PositiveInt = 10


class PgdTraining(PgdSteps):
    """Train on PGD images (Madry et al., 2018)."""

    method: Literal["pgd"]


class TradesTraining(PgdSteps):
    """Clean cross-entropy plus `beta` times the divergence that PGD reaches (TRADES, Zhang et al., 2019)."""

    method: Literal["trades"]
    step_size: PositiveFloat = 0.007
    beta: PositiveFloat = 6.0


class AvmixupTraining(PgdSteps):
    """Train on mixtures of an image and its adversarial vertex (AVmixup, Lee et al., 2020)."""

    method: Literal["avmixup"]
    gamma: PositiveFloat = 2.0
    """How far the vertex lies beyond the adversarial image."""
    clean_share: Fraction = 1.0
    """What the target of the clean end leaves on the true class; the rest is spread over the others."""
    vertex_share: Fraction = 0.1
    """The same for the vertex."""


AdversarialTraining = Annotated[
    NoisyFgsmTraining | PgdTraining | TradesTraining | AvmixupTraining, Field(discriminator="method")
]

TRADES_START = 0.001
"""Deviation of the noise that TRADES starts from: where both outputs are equal the divergence has no gradient."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Cross-entropy of logits (N, K) and targets (N, K), as the recipe smooths it."""


@contextmanager
def running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms in train mode normalize by the batch and leave their running statistics alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def attack(
    model: Model, images: Tensor, targets: Tensor, method: AdversarialTraining, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The images that a method trains on in the place of `images`, and their targets."""
    match method:
        case NoisyFgsmTraining():
            attacked = noisy_fgsm(model, images, targets, eps=method.eps, noise=method.noise, generator=generator)
            return attacked, targets
        case TradesTraining():
            return farthest(model, images, method, generator), targets
        case PgdTraining() | AvmixupTraining():
            attacked = pgd_linf(
                model,
                images,
                targets,
                eps=method.eps,
                steps=method.steps,
                step_size=method.step_size,
                generator=generator,
            )
            if isinstance(method, PgdTraining):
                return attacked, targets
            return avmixup(images, attacked, targets, method, generator)


def farthest(model: Model, images: Tensor, method: TradesTraining, generator: torch.Generator) -> Tensor:
    """Images in the ball whose outputs diverge most from those of `images` (TRADES, Eq. 5)."""
    with torch.no_grad():
        clean = model(images).softmax(1)

    def divergence(moved: Tensor) -> Tensor:
        return F.kl_div(model(moved).log_softmax(1), clean, reduction="none").sum(1)

    start = images + TRADES_START * torch.randn(images.shape, generator=generator).to(images.device)
    objective, threat = differentiated(divergence), Linf(method.eps)
    return ascend(objective, start, images, threat, steps=method.steps, step_size=method.step_size)


def avmixup(
    images: Tensor, attacked: Tensor, targets: Tensor, method: AvmixupTraining, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image mixed with its adversarial vertex x + gamma (x' - x), and the smoothed targets mixed likewise.

    AVmixup (Lee et al., 2020), Eq. 8 to 10; the share of the image is uniform.
    """
    mixed, share = vertex_mixture(images, attacked, gamma=method.gamma, generator=generator)
    clean_end, vertex_end = (smoothed(targets, kept) for kept in (method.clean_share, method.vertex_share))
    return mixed, torch.lerp(vertex_end, clean_end, share.view(-1, 1))


def vertex_mixture(
    images: Tensor, attacked: Tensor, *, gamma: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image mixed with its vertex x + gamma (x' - x), clipped to [0, 1], and the image's uniform share, (N,)."""
    vertex = (images + gamma * (attacked - images)).clamp(0, 1)
    share = torch.rand(len(images), generator=generator).to(images.device)
    return torch.lerp(vertex, images, share.view(-1, 1, 1, 1)), share


def smoothed(targets: Tensor, kept: float) -> Tensor:
    """Targets (N, K) of which `kept` stays on the true classes and the rest goes to the others in equal parts."""
    return kept * targets + (1 - kept) * (1 - targets) / (targets.shape[1] - 1)


def training_loss(
    model: Model, images: Tensor, attacked: Tensor, targets: Tensor, method: AdversarialTraining | None, loss: Loss
) -> tuple[Tensor, Tensor]:
    """What a step minimizes, and the logits (N, K) of the images that it was trained on."""
    if isinstance(method, TradesTraining):
        clean, moved = model(images), model(attacked)
        divergence = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return loss(clean, targets) + method.beta * divergence, moved
    logits = model(attacked)
    return loss(logits, targets), logits
