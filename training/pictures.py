"""What an attack and a defense do to a few images, for the report: each stage as an image, and what was read in it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import transforms
from models.atop import AtopPurifier
from models.defense import DefendedClassifier
from training.attacks.looks import Looks

MAGNIFIED = 8
"""Differences are shown this many times as large, around mid-grey."""


@dataclass(frozen=True)
class Picture:
    """One image (3, H, W) in [0, 1] on its way, as PNG data URLs."""

    label: str
    original: str
    adversarial: str
    transformed: str | None
    """What the purifier saw: masked and noisy; None where it transforms nothing."""
    purified: str
    attack: str
    """Adversarial minus original, magnified."""
    correction: str
    """Purified minus adversarial, magnified."""
    read_undefended: str
    read_adversarial: str
    read_purified: str


def pictures(
    defended: DefendedClassifier,
    classes: tuple[str, ...],
    images: Tensor,
    labels: Tensor,
    adversarial: Tensor,
    looks: Looks,
) -> list[Picture]:
    """The stages of a few images (N, 3, H, W); the labels are those that the classifier reads in each.

    Of several votes the first is shown.
    """
    seeds = looks.next()
    with torch.no_grad():
        purified = defended.purify(adversarial, seeds)
        seen = transformed(defended, adversarial, seeds)
        bare, fooled, saved = (defended.classifier(x).argmax(1).tolist() for x in (images, adversarial, purified))
    return [
        Picture(
            label=classes[int(labels[i])],
            original=data_url(images[i]),
            adversarial=data_url(adversarial[i]),
            transformed=None if seen is None else data_url(seen[i]),
            purified=data_url(purified[i]),
            attack=data_url(magnified(adversarial[i] - images[i])),
            correction=data_url(magnified(purified[i] - adversarial[i])),
            read_undefended=classes[bare[i]],
            read_adversarial=classes[fooled[i]],
            read_purified=classes[saved[i]],
        )
        for i in range(len(images))
    ]


def transformed(defended: DefendedClassifier, images: Tensor, seeds: list[int]) -> Tensor | None:
    """What the first purifier makes of images before it restores them; None unless it is AToP."""
    first = next(iter(defended.chain), None)
    if not isinstance(first, AtopPurifier):
        return None
    own = defended.step_seeds(seeds, 0, 0)
    noisy = first.noisy(first.enlarge(images), own)
    return transforms.hide(noisy, first.draw_masks(own, images.device)[0])


def magnified(difference: Tensor) -> Tensor:
    """A difference in [-1, 1] as an image around mid-grey."""
    return (0.5 + MAGNIFIED * difference).clamp(0, 1)


def data_url(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as a PNG data URL."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
