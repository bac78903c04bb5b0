"""Attacks: our own PGD for training, Foolbox for the numbers that are reported.

`model` maps images in [0, 1] to logits. Every attack returns adversarial images inside the l-inf ball of
radius `eps` around the given ones and inside [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from foolbox.attacks.base import FixedEpsilonAttack
from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from models.gradients import ball

Model = Callable[[Tensor], Tensor]


def loss_gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the images; no weight receives one."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    return gradient


def fgsm(model: Model, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """The fast gradient sign method (Goodfellow et al., 2015): one step of size `eps`."""
    return (images + eps * loss_gradient(model, images, labels).sign()).clamp(0, 1)


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
    """Projected gradient descent from a uniform random start (Madry et al., 2018)."""
    lower, upper = ball(images, eps)
    start = torch.rand(images.shape, generator=generator).to(images.device)
    adversarial = torch.lerp(lower, upper, start)
    for _ in range(steps):
        gradient = loss_gradient(model, adversarial, labels)
        adversarial = torch.clamp(adversarial + step_size * gradient.sign(), lower, upper)
    return adversarial


def foolbox_fgsm(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """FGSM as Foolbox runs it; raises ValueError unless the classifier is frozen."""
    return _foolbox(LinfFastGradientAttack(random_start=False), classifier, images, labels, eps)


def foolbox_pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """PGD with a random start as Foolbox runs it; its randomness is torch's global generator.

    Raises ValueError unless the classifier is frozen.
    """
    attack = LinfProjectedGradientDescentAttack(abs_stepsize=step_size, steps=steps, random_start=True)
    return _foolbox(attack, classifier, images, labels, eps)


def _foolbox(
    attack: FixedEpsilonAttack,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
) -> Tensor:
    if any(weight.requires_grad for weight in classifier.parameters()):
        raise ValueError("the classifier's weights must not ask for gradients: Foolbox would leave some in them")
    model = PyTorchModel(classifier.eval(), bounds=(0, 1), device=images.device)
    criterion = Misclassification(labels)
    # `run` returns the attack's last iterate for every image, like the papers' attacks; calling the attack
    # itself would also stop early and clip to the budget once more.
    adversarial: Tensor = attack.run(model, images, criterion, epsilon=eps)
    return adversarial.detach()
