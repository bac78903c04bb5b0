"""Level L1 by name: attacks on the classifier alone, as the three papers run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from models.classifiers import Classifier
from models.randomness import derive_seed, generator_for
from training.attacks import by_autoattack, by_foolbox
from training.attacks.gradients import diverse
from training.attacks.pgd import ascend, classified
from training.attacks.threats import L2, Linf, Threat

PGD_STEP = 1 / 4
"""Of eps: 2/255 at 8/255, as in AToP and ZeroPur. AID has 1/255."""
L2_EPS, L2_STEP, L2_STEPS = 0.5, 0.05, 20
DI2_STEPS = 10
CW_STEPS, CW_C = 100, 1.0
CW20_STEPS, CW20_C, CW20_EPS = 20, 0.01, 3.0
"""C&W as AID's authors run it; the last is the l2 ball that they cut it off at."""
CW_SETTINGS = {"step_size": 0.01, "failed": "stay"}
AUTOATTACK_PASSES = 1000
"""A guess: an image that withstands it takes some 4,000, one that does not a hundred."""

Run = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Images (N, 3, H, W), labels (N,) and the images' numbers to adversarial images."""


@dataclass(frozen=True)
class GreyBox:
    """An attack on a classifier."""

    run: Run
    threat: Threat | None
    """None for one without a bound."""
    passes: int
    """Gradients per image."""
    settings: Mapping[str, object] = field(default_factory=dict)


def attack(name: str, classifier: Classifier, *, eps: float, seed: int) -> GreyBox:
    """The attack of that name (a `GreyBoxName`): l-inf bound `eps`, `pgdN_l2` 0.5 in l2, `cw` without a bound.

    `cw20` is that of AID's released code: a constant of 0.01, 20 steps, cut off at an l2 of 3.
    """
    threat, step_size = Linf(eps), PGD_STEP * eps

    def seeded(numbers: Sequence[int]) -> None:
        torch.manual_seed(derive_seed(seed, "foolbox", numbers[0]))  # Foolbox draws from the global generator

    def fgsm(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return by_foolbox.foolbox_fgsm(classifier, images, labels, eps=eps)

    def pgd(steps: int, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        seeded(numbers)
        return by_foolbox.foolbox_pgd(classifier, images, labels, eps=eps, steps=steps, step_size=step_size)

    def pgd_l2(steps: int, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        seeded(numbers)
        return by_foolbox.foolbox_pgd_l2(classifier, images, labels, eps=L2_EPS, steps=steps, step_size=L2_STEP)

    def mim(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return by_foolbox.foolbox_mim(classifier, images, labels, eps=eps)

    def deepfool(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return by_foolbox.foolbox_deepfool(classifier, images, labels, eps=eps)

    def cw(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return by_foolbox.foolbox_cw(classifier, images, labels, steps=CW_STEPS, c=CW_C)

    def cw20(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        moved = by_foolbox.foolbox_cw(classifier, images, labels, steps=CW20_STEPS, c=CW20_C)
        return L2(CW20_EPS).project(moved, images)

    def di2(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        objective = classified(classifier, labels)
        climbed = diverse(objective, generator_for(seed, "di2", numbers[0]))
        return ascend(climbed, images, images, threat, steps=DI2_STEPS, step_size=eps / 8)

    def autoattack(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        return by_autoattack.autoattack(classifier, images, labels, threat, seed=seed)

    known: dict[str, GreyBox] = {
        "fgsm": GreyBox(fgsm, threat, 1),
        "mim": GreyBox(mim, threat, 40, {"steps": 40, "step_size": 0.003}),
        "deepfool": GreyBox(deepfool, threat, 20 * 10, {"steps": 20}),
        "cw": GreyBox(cw, None, CW_STEPS, {"steps": CW_STEPS, "c": CW_C, **CW_SETTINGS}),
        "cw20": GreyBox(
            cw20, L2(CW20_EPS), CW20_STEPS, {"eps": CW20_EPS, "steps": CW20_STEPS, "c": CW20_C, **CW_SETTINGS}
        ),
        "di2": GreyBox(di2, threat, DI2_STEPS, {"steps": DI2_STEPS, "step_size": eps / 8}),
        "autoattack": GreyBox(autoattack, threat, AUTOATTACK_PASSES, {"version": "standard"}),
    }
    if name in known:
        return known[name]
    steps = int(name.removeprefix("pgd").removesuffix("_l2") or L2_STEPS)
    if name.endswith("_l2"):
        settings = {"eps": L2_EPS, "steps": steps, "step_size": L2_STEP}
        return GreyBox(partial(pgd_l2, steps), L2(L2_EPS), steps, settings)
    return GreyBox(partial(pgd, steps), threat, steps, {"steps": steps, "step_size": step_size})
