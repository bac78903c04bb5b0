"""Attacks as Foolbox runs them: the numbers that the papers report, and a referee for ours.

Their randomness is torch's global generator. Every function raises ValueError unless the classifier is frozen.
"""

from __future__ import annotations

from foolbox.attacks.base import FixedEpsilonAttack
from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn


def foolbox_fgsm(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """FGSM without a random start."""
    return _run(LinfFastGradientAttack(random_start=False), classifier, images, labels, eps)


def foolbox_pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """PGD in the l-inf ball, from a random start."""
    attack = LinfProjectedGradientDescentAttack(abs_stepsize=step_size, steps=steps, random_start=True)
    return _run(attack, classifier, images, labels, eps)


def _run(attack: FixedEpsilonAttack, classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    if any(weight.requires_grad for weight in classifier.parameters()):
        raise ValueError("the classifier's weights must not ask for gradients: Foolbox would leave some in them")
    model = PyTorchModel(classifier.eval(), bounds=(0, 1), device=images.device)
    # `run` returns the attack's last iterate for every image, like the papers' attacks; calling the attack
    # itself would also stop early and clip to the budget once more.
    adversarial: Tensor = attack.run(model, images, Misclassification(labels), epsilon=eps)
    return adversarial.detach()
