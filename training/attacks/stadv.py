"""StAdv (Xiao et al., 2018): an image is moved, not changed: every pixel is taken from a place nearby."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.defense import DefendedClassifier
from models.randomness import generator_for
from training.attacks.looks import Looks, seen
from training.attacks.pgd import margin

FLOW_PENALTY = 0.0025 / 0.05
"""Weight of the flow's unevenness, per unit of the bound that it was chosen for."""
CONFIDENCE = 5.0
"""How far, in logits, a random defense is pushed: what fools one look barely is often seen right in the next."""


def stadv(
    defended: DefendedClassifier,
    images: Tensor,
    labels: Tensor,
    looks: Looks,
    *,
    bound: float = 0.05,
    steps: int = 100,
    step_size: float = 0.01,
    draws: int = 1,
) -> Tensor:
    """Adam on a flow field, whose entries stay within `bound` of the width and height [-1, 1] of the image.

    The loss is that of Carlini & Wagner plus a penalty on neighbors that move apart; with randomness it is the mean of
    `draws` looks. An image keeps the flow of its largest margin. Raises AssertionError if a flow leaves the bound.
    """
    draws, enough = draws if defended.is_random else 1, confidence(defended)
    count, _, height, width = images.shape
    straight = F.affine_grid(torch.eye(2, 3, device=images.device).expand(count, 2, 3), [*images.shape], False)
    generator = generator_for(looks.seed, "flow")
    start = bound * (2 * torch.rand(count, height, width, 2, generator=generator) - 1) / 10
    flow = start.to(images.device).requires_grad_()
    optimizer = torch.optim.Adam([flow], lr=step_size)
    best, largest = torch.zeros_like(flow), torch.full((count,), -torch.inf, device=images.device)
    for _ in range(steps):
        with torch.enable_grad():
            moved = bent(images, straight, flow)
            answers = [margin(seen(defended, looks.next())(moved), labels) for _ in range(draws)]
            margins = torch.stack(answers).mean(0)
            loss = (-margins.clamp(max=enough) + FLOW_PENALTY * unevenness(flow)).sum()
        (flow.grad,) = torch.autograd.grad(loss, [flow])
        better = margins.detach() > largest
        best = torch.where(better.view(-1, 1, 1, 1), flow.detach(), best)
        largest = torch.maximum(largest, margins.detach())
        optimizer.step()
        with torch.no_grad():
            flow.clamp_(-bound, bound)
    assert bool((best.abs() <= bound).all()), "stadv moves a pixel further than its bound"
    with torch.no_grad():
        return bent(images, straight, best)


def confidence(defended: DefendedClassifier) -> float:
    """The margin at which an image is left alone."""
    return CONFIDENCE if defended.is_random else 0.0


def bent(images: Tensor, straight: Tensor, flow: Tensor) -> Tensor:
    """Images sampled bilinearly at the straight grid plus the flow, (N, H, W, 2); borders repeat."""
    sampled = F.grid_sample(images, straight + flow, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.clamp(0, 1)


def unevenness(flow: Tensor) -> Tensor:
    """Sum over pixels of how far right and lower neighbors move apart, (N,) (StAdv, Eq. 4, on a one-sided grid)."""
    right, down = flow[:, :-1, 1:] - flow[:, :-1, :-1], flow[:, 1:, :-1] - flow[:, :-1, :-1]
    return (right.square().sum(-1) + down.square().sum(-1) + 1e-8).sqrt().sum((1, 2))
