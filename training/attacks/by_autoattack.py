"""AutoAttack and Square as their authors publish them (Croce & Hein, 2020; Andriushchenko et al., 2020)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from training.attacks.pgd import margin
from training.attacks.threats import L2, Linf

NORMS = {Linf: "Linf", L2: "L2"}
NEVER_ENOUGH = 1e6
"""In the place of a margin that must not end a search."""


class _PlainLayout(torch.autograd.Function):
    """The identity, whose gradient lies in memory as the attacks assume: channel by channel."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Attacked(nn.Module):
    """The model as the attacks see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        plain: Tensor = _PlainLayout.apply(images)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(plain)
        # Where no gradient comes back through the model, it is zero.
        return logits + 0 * plain.flatten(1).sum(1, keepdim=True) if images.requires_grad else logits


class _Persistent(SquareAttack):  # type: ignore[misc]
    """Square that searches on beyond the first wrong answer: that of a random defense may have been luck."""

    def margin_and_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        margins, loss = super().margin_and_loss(images, labels)
        return torch.full_like(margins, NEVER_ENOUGH), loss


@contextmanager
def _quiet() -> Iterator[None]:
    """Without AutoAttack's warnings about the model: `training.credibility` looks at the same signs, and more."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flags_doc")
            yield
    finally:
        logger.setLevel(level)


def autoattack(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Linf | L2, *, seed: int, batch_size: int = 128
) -> Tensor:
    """AutoAttack `standard` on a deterministic model: APGD-CE, APGD-T, FAB-T and Square, each on what is left.

    Targeted attacks try the nine likeliest wrong classes, or all where there are fewer. An image that withstands all
    four comes back as it was. Raises ValueError for fewer than four classes, which its targeted loss needs.
    """
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    if classes < 4:
        raise ValueError("AutoAttack's targeted loss needs four classes or more")
    attack = AutoAttack(
        _Attacked(model), norm=NORMS[type(threat)], eps=threat.eps, seed=seed, version="standard", device=images.device
    )
    attack.verbose = False
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    with _quiet():
        adversarial: Tensor = attack.run_standard_evaluation(images.contiguous(), labels, batch_size=batch_size)[0]
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
    is_random: bool,
) -> Tensor:
    """Auto-PGD, gradients averaged over `draws` calls.

    From a deterministic model an image that it misclassified, else the one of the highest loss; from a random one the
    latter always. With both losses, 100 steps and 20 draws these are the two attacks of AutoAttack `rand`, which keeps
    an image only if a single call misclassified it: a verdict of its own, that we leave to ours.
    """
    attack = APGDAttack(
        _Attacked(model),
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
    torch.manual_seed(seed)  # its random start
    with _quiet():
        attack.init_hyperparam(images)
        highest, right, _, wrong = attack.attack_single_run(images.contiguous(), labels)
    found: Tensor = highest if is_random else torch.where(right.bool().view(-1, 1, 1, 1), highest, wrong)
    return found.detach()


def keeps(is_random: bool) -> str:
    """What `apgd` hands back, in a word, for a report's settings."""
    return "highest loss" if is_random else "misclassified"


def rand(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Linf | L2,
    *,
    steps: int,
    draws: int,
    seed: int,
    is_random: bool,
) -> Tensor:
    """The two attacks of AutoAttack `rand`, each on every image: the better one, by its mean margin over `draws` calls.

    The verdict is left to us, as in `apgd`. The difference-of-logits ratio (DLR) needs three classes.
    """
    ce, dlr = (
        apgd(model, images, labels, threat, loss=loss, steps=steps, draws=draws, seed=seed, is_random=is_random)
        for loss in ("ce", "dlr")
    )
    better = mean_margin(model, dlr, labels, draws) > mean_margin(model, ce, labels, draws)
    return torch.where(better.view(-1, 1, 1, 1), dlr, ce)


@torch.no_grad()
def mean_margin(model: nn.Module, images: Tensor, labels: Tensor, calls: int) -> Tensor:
    """Of several calls, (N,): positive where the image is misclassified."""
    return torch.stack([margin(model(images), labels) for _ in range(calls)]).mean(0)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Linf | L2,
    *,
    queries: int,
    seed: int,
    is_random: bool,
) -> Tensor:
    """Square: random search with at most `queries` calls an image, no gradient; the images of the largest margin.

    It stops at an image that a deterministic model misclassifies, and goes on where the model is random.
    """
    kind = _Persistent if is_random else SquareAttack
    attack = kind(
        _Attacked(model),
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
        attack.init_hyperparam(images)
        torch.manual_seed(seed)
        adversarial: Tensor = attack.attack_single_run(images.contiguous(), labels)[1]
    return adversarial
