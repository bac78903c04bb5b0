"""What an attacker climbs: gradients through a defense, around it, and of what the defense itself looks at.

Each function here returns an `Objective` for `ascend`, whose value is the margin where it asks the defense itself.
Where the defense draws, it is the mean over several looks (EOT, Athalye et al., 2018): gradients are averaged, then
the threat takes the sign.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.aid import Aid
from models.blur import blur
from models.classifiers import Classifier
from models.defense import DefendedClassifier, together
from models.gate import GatePurifier
from models.manifest import ZeroPurPreset
from models.zeropur import compared, cosines
from training.attacks.looks import Looks, seen
from training.attacks.pgd import Loss, Objective, classified, cross_entropy, differentiated, margin

NEAR_CERTAIN = 1e-7
"""A threshold nearer to 0 or 1 is taken for this near: those themselves have no logit."""


def through(
    defended: DefendedClassifier, labels: Tensor, looks: Looks, *, draws: int, loss: Loss = cross_entropy
) -> Objective:
    """The exact gradient, backward through transform, purifier and classifier."""

    def one_look(seeds: list[int]) -> Objective:
        return classified(seen(defended, seeds), labels, loss)

    return averaged(one_look, looks, draws if defended.is_random else 1)


def around(
    defended: DefendedClassifier, labels: Tensor, looks: Looks, *, draws: int, loss: Loss = cross_entropy
) -> Objective:
    """BPDA: the real purifier forward, the identity backward, so the classifier's gradient at the purified images."""

    def one_look(seeds: list[int]) -> Objective:
        def answer(images: Tensor) -> Tensor:
            with torch.no_grad():
                purified = [defended.purify(images.detach(), seeds, vote) for vote in range(defended.votes)]
            identity = images - images.detach()  # zero, whose derivative is one
            return together([defended.classifier(each + identity) for each in purified])

        return classified(answer, labels, loss)

    return averaged(one_look, looks, draws if defended.is_random else 1)


def averaged(one_look: Callable[[list[int]], Objective], looks: Looks, draws: int) -> Objective:
    """The mean of `draws` looks, new ones at every step."""

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = zip(*(one_look(looks.next())(images) for _ in range(draws)), strict=True)
        return torch.stack(values).mean(0), torch.stack(gradients).mean(0)

    return at


def while_natural(aid: Aid, labels: Tensor, *, weight: float) -> Objective:
    """The auxiliary-aware attack on AID: CE(f(x), y) + weight * log D(x): fool f while D sees a natural image.

    AID, App. E, after Shi et al. (2021).
    """
    return differentiated(lambda x: cross_entropy(aid.classifier(x), labels) + weight * F.logsigmoid(aid.logits(x)))


def past_the_gate(
    gate: GatePurifier, passed: DefendedClassifier, labels: Tensor, looks: Looks, *, draws: int
) -> Objective:
    """The attack on `auto`, which meets two ends at once: AID lets an image pass, and what it then meets is wrong.

    The objective is the lesser of their margins, in logits, so each step is for the end that is farther off, and it is
    positive where both are met; after selective PGD (Bryniarski et al., 2022), which turns to the detector once the
    classifier is fooled. `passed` is the cheap chain.
    """
    fooling = through(passed, labels, looks, draws=draws, loss=margin)
    threshold = float(torch.tensor(gate.threshold, dtype=torch.float64).logit(eps=NEAR_CERTAIN))
    passing = differentiated(lambda x: gate.aid.logits(x) - threshold)

    def at(images: Tensor) -> tuple[Tensor, Tensor]:
        (wrong, to_fool), (natural, to_pass) = fooling(images), passing(images)
        return torch.minimum(wrong, natural), torch.where((wrong < natural).view(-1, 1, 1, 1), to_fool, to_pass)

    return at


def while_aligned(classifier: Classifier, preset: ZeroPurPreset, labels: Tensor, *, weight: float) -> Objective:
    """The defense-aware attack on ZeroPur: CE(f(x), y) - weight * (1 - cos(z(x), z(B(x)))).

    An image whose embedding already agrees with that of its blurred copy leaves coarse shifting nothing to ascend. With
    `coarse_layers` it is the mean of their cosines.
    After Mao et al. (2021), who leave the auxiliary loss to the defense; both arguments are differentiated, but for a
    TV blur, which has no gradient.
    """

    def objective(images: Tensor) -> Tensor:
        clear, blurred = (compared(classifier, x, preset) for x in (images, blur(images, preset.blur)))
        agreement = torch.stack(cosines(clear, blurred)).mean(0)
        return cross_entropy(classifier(images), labels) - weight * (1 - agreement)

    return differentiated(objective)


def diverse(
    objective: Objective, generator: torch.Generator, *, probability: float = 0.5, scale: float = 1.1
) -> Objective:
    """DI2-FGSM (Xie et al., 2019): with `probability` the objective is that of a resized, zero-padded image.

    The side is drawn between the image's own and `scale` times it, and padded to the latter; the gradient with
    respect to the original image comes back through padding and resizing.
    """

    def transformed(images: Tensor) -> Tensor:
        if torch.rand((), generator=generator) >= probability:
            return images
        side = images.shape[-1]
        largest = round(scale * side)
        size = int(torch.randint(side, largest + 1, (), generator=generator))
        top, left = (int(torch.randint(0, largest - size + 1, (), generator=generator)) for _ in range(2))
        resized = F.interpolate(images, size=(size, size), mode="nearest")
        padded = F.pad(resized, (left, largest - size - left, top, largest - size - top))
        return F.interpolate(padded, size=(side, side), mode="nearest")

    def through_the_transform(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            seen = transformed(images)
        value, gradient = objective(seen.detach())
        (back,) = torch.autograd.grad(seen, images, grad_outputs=gradient)
        return value, back

    return through_the_transform
