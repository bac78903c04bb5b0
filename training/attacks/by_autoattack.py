"""AutoAttack and Square as their authors publish them (Croce & Hein, 2020; Andriushchenko et al., 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from training.attacks.threats import L2, Linf

NORMS = {Linf: "Linf", L2: "L2"}


def autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Linf | L2, *, seed: int, batch_size: int = 128
) -> Tensor:
    """AutoAttack `standard` on a deterministic model: APGD-CE, APGD-T, FAB-T and Square, each on what is left.

    Targeted attacks try the nine likeliest wrong classes, or all where there are fewer. An image that withstands all
    four comes back as it was. Raises ValueError for two classes, for which the targeted loss is not defined.
    """
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    if classes < 3:
        raise ValueError("AutoAttack's targeted loss needs three classes or more")
    attack = AutoAttack(
        model, norm=NORMS[type(threat)], eps=threat.eps, seed=seed, version="standard", device=images.device
    )
    attack.verbose = False
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    adversarial: Tensor = attack.run_standard_evaluation(images, labels, batch_size=batch_size)[0]
    return adversarial


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Linf | L2,
    *,
    loss: Literal["ce", "dlr"],
    steps: int,
    draws: int,
    seed: int,
) -> Tensor:
    """Auto-PGD, gradients averaged over `draws` calls; the images of the highest loss.

    With both losses, 100 steps and 20 draws these are the two attacks of AutoAttack `rand`, which keeps an image only
    if a single call misclassified it: a verdict of its own, that we leave to ours.
    """
    attack = APGDAttack(
        model,
        n_iter=steps,
        n_restarts=1,
        norm=NORMS[type(threat)],
        eps=threat.eps,
        eot_iter=draws,
        loss=loss,
        rho=0.75,
        seed=seed,
        device=images.device,
    )
    torch.manual_seed(seed)  # with `best_loss` it does not seed its random start itself
    adversarial: Tensor = attack.perturb(images, labels, best_loss=True)
    return adversarial


def square(model: nn.Module, images: Tensor, labels: Tensor, threat: Linf | L2, *, queries: int, seed: int) -> Tensor:
    """Square: random search with at most `queries` calls an image, no gradient. One that withstands stays as it was."""
    attack = SquareAttack(
        model,
        norm=NORMS[type(threat)],
        eps=threat.eps,
        n_queries=queries,
        p_init=0.8,
        n_restarts=1,
        resc_schedule=False,
        seed=seed,
        device=images.device,
    )
    with torch.no_grad():
        adversarial: Tensor = attack.perturb(images, labels)
    return adversarial
