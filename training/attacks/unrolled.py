"""The attacker's copy of the defenses that descend at test time: every iterate, and signs with a derivative.

AID and ZeroPur add signs of gradients in a ball around what they received, so their exact derivative is the identity
almost everywhere and BPDA is exact. More strength comes from two ideas: averaging the gradient over the iterates
(Croce et al., 2022), and replacing the sign by tanh, whose derivative tells how the purifier would answer. Each
purification step is recomputed in the backward pass, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.aid import AidPurifier
from models.blur import blur
from models.gradients import ball
from models.zeropur import ZeroPurPurifier, compared, cosines, dot, l1_normalized
from training.attacks.pgd import Model, Objective, classified, margin
from training.attacks.threats import TINY

Sign = Callable[[Tensor], Tensor]
Descending = AidPurifier | ZeroPurPurifier


def smooth_sign(sharpness: float) -> Sign:
    """tanh(sharpness * u / max|u|), per image: the sign as `sharpness` grows."""

    def sign(values: Tensor) -> Tensor:
        largest = values.abs().amax((1, 2, 3), keepdim=True)
        return torch.tanh(sharpness * values / largest.clamp(min=TINY))

    return sign


def iterates(
    purifier: Descending, images: Tensor, sign: Sign = torch.sign, *, checkpointed: bool = True
) -> list[Tensor]:
    """What the purifier makes of images (N, 3, H, W), step by step, the last being its answer.

    With a smooth sign they are differentiable with respect to `images`. Raises ValueError for a ZeroPur preset with a
    random start, a perceptual term or no step at all, which this copy does not know.
    """

    def run(step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if checkpointed and torch.is_grad_enabled():
            made: Tensor = checkpoint(step, *inputs, use_reentrant=False)
            return made
        return step(*inputs)

    if not can_be_unrolled(purifier):
        raise ValueError("a ZeroPur preset with a random start, a perceptual term or no step cannot be unrolled")
    if isinstance(purifier, AidPurifier):
        return _aid(purifier, images, sign, run)
    return _zeropur(purifier, images, sign, run)


def can_be_unrolled(purifier: Descending) -> bool:
    """Whether `iterates` knows every step of the purifier."""
    if isinstance(purifier, AidPurifier):
        return True
    preset = purifier.preset
    return preset.coarse_steps > 0 and not (preset.random_start or preset.perceptual_weight)


Run = Callable[..., Tensor]


def _aid(purifier: AidPurifier, images: Tensor, sign: Sign, run: Run) -> list[Tensor]:
    preset, (lower, upper) = purifier.preset, ball(images, purifier.preset.eps)

    def step(moved: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        ascent = slope(lambda x: purifier.aid.logits(x).sum(), moved)
        return torch.clamp(moved + preset.step_size * sign(ascent), lower, upper)

    found = [images]
    for _ in range(preset.steps):
        found.append(run(step, found[-1], lower, upper))
    return found[1:]


def _zeropur(purifier: ZeroPurPurifier, images: Tensor, sign: Sign, run: Run) -> list[Tensor]:
    classifier, preset = purifier.classifier, purifier.preset
    lower, upper = ball(images, preset.eps)

    def ascent(shifted: Tensor) -> Tensor:
        targets = compared(classifier, blur(shifted, preset.blur), preset)
        return slope(lambda x: torch.stack(cosines(compared(classifier, x, preset), targets)).sum(), shifted)

    def faster(shifted: Tensor, velocity: Tensor) -> Tensor:
        return l1_normalized(ascent(shifted)) + preset.momentum * velocity if preset.momentum else ascent(shifted)

    def coarse(shifted: Tensor, velocity: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.clamp(shifted + preset.coarse_step_size * sign(velocity), lower, upper)

    found, velocity = [images], torch.zeros_like(images)
    for _ in range(preset.coarse_steps):
        velocity = run(faster, found[-1], velocity)
        found.append(coarse(found[-1], velocity, lower, upper))
    if not preset.fine_steps:
        return found[1:]

    shifted, aligned = found[-1], images
    pairs = zip(
        classifier.features(images, preset.fine_layers), classifier.features(shifted, preset.fine_layers), strict=True
    )
    directions = [target - original for original, target in pairs]

    def fine(aligned: Tensor, lower: Tensor, upper: Tensor, *directions: Tensor) -> Tensor:
        def projection(x: Tensor) -> Tensor:
            features = classifier.features(x, preset.fine_layers)
            return torch.stack([dot(f, d) for f, d in zip(features, directions, strict=True)]).sum()

        return torch.clamp(aligned + preset.fine_step_size * sign(slope(projection, aligned)), lower, upper)

    for _ in range(preset.fine_steps):
        aligned = run(fine, aligned, lower, upper, *directions)
        found.append(aligned)
    return found[1:]


def slope(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The gradient of function(images) by its own argument alone, differentiable where gradients are switched on."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        # A copy that depends on `images`, so that what else `function` made of them is not differentiated here.
        own = images * 1 if images.requires_grad else images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(own), own, create_graph=keep)
    return gradient if keep else gradient.detach()


def over_iterates(purifier: Descending, classifier: Model, labels: Tensor) -> Objective:
    """BPDA at every iterate, averaged (Croce et al., 2022): an early one often says more than the last.

    Its value is the margin at the last, which is what the defense answers.
    """
    behind = classified(classifier, labels)

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            seen = iterates(purifier, images)
        margins, gradients = zip(*(behind(moved) for moved in seen), strict=True)
        return margins[-1], torch.stack(gradients).mean(0)

    return at


def through_smooth_steps(purifier: Descending, classifier: Model, labels: Tensor, *, sharpness: float) -> Objective:
    """The gradient through the whole unrolled purification with tanh in the place of every sign.

    Its value is the margin behind the real purification.
    """

    copy = classified(lambda x: classifier(iterates(purifier, x, smooth_sign(sharpness))[-1]), labels)

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        _, gradient = copy(images)
        with torch.no_grad():
            answer = classifier(iterates(purifier, images)[-1])
        return margin(answer, labels), gradient

    return at
