"""Attacks as Foolbox runs them: the numbers that the papers report, and a referee for ours.

Their randomness is torch's global generator. Every function raises ValueError unless the classifier is frozen.
"""

from __future__ import annotations

import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
from foolbox.attacks.deepfool import LinfDeepFoolAttack
from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
from foolbox.attacks.mi_fgsm import LinfMomentumIterativeFastGradientMethod
from foolbox.attacks.projected_gradient_descent import (
    L2ProjectedGradientDescentAttack,
    LinfProjectedGradientDescentAttack,
)
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from training.attacks.threats import Linf


def foolbox_fgsm(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """FGSM without a random start."""
    return _run(LinfFastGradientAttack(random_start=False), classifier, images, labels, eps)


def foolbox_pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """PGD in the l-inf ball, from a random start."""
    attack = LinfProjectedGradientDescentAttack(abs_stepsize=step_size, steps=steps, random_start=True)
    return _run(attack, classifier, images, labels, eps)


def foolbox_pgd_l2(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """PGD in the l2 ball, from a random start."""
    attack = L2ProjectedGradientDescentAttack(abs_stepsize=step_size, steps=steps, random_start=True)
    return _run(attack, classifier, images, labels, eps)


def foolbox_mim(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 40, step_size: float = 0.003
) -> Tensor:
    """MIM (Dong et al., 2018), decay 1; Foolbox adds up plain gradients, the paper divides each by its l1 norm."""
    attack = LinfMomentumIterativeFastGradientMethod(momentum=1.0, abs_stepsize=step_size, steps=steps)
    return _run(attack, classifier, images, labels, eps)


def foolbox_deepfool(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int = 20) -> Tensor:
    """DeepFool in the l-inf norm, overshoot 0.02, cut off at `eps`."""
    attack = LinfDeepFoolAttack(steps=steps, overshoot=0.02, candidates=None)
    return Linf(eps).project(_run(attack, classifier, images, labels, None), images)


def foolbox_cw(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, steps: int = 100, step_size: float = 0.01, c: float = 1.0
) -> Tensor:
    """C&W (2017) in the l2 norm with one constant and no bound, as the papers run it; an image it fails on stays.

    Foolbox makes that one black.
    """
    attack = L2CarliniWagnerAttack(binary_search_steps=1, steps=steps, stepsize=step_size, initial_const=c)
    moved = _run(attack, classifier, images, labels, None)
    return torch.where(moved.flatten(1).any(1).view(-1, 1, 1, 1), moved, images)


def _run(
    attack: FixedEpsilonAttack | MinimizationAttack,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | None,
) -> Tensor:
    if any(weight.requires_grad for weight in classifier.parameters()):
        raise ValueError("the classifier's weights must not ask for gradients: Foolbox would leave some in them")
    model = PyTorchModel(classifier.eval(), bounds=(0, 1), device=images.device)
    # `run` returns the attack's last iterate for every image, like the papers' attacks; calling the attack
    # itself would also stop early and clip to the budget once more.
    budget = {} if eps is None else {"epsilon": eps}
    adversarial: Tensor = attack.run(model, images, Misclassification(labels), **budget)
    return adversarial.detach()
