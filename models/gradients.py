"""What the defenses that descend at test time share: gradients of images, and balls around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def input_gradient(
    function: Callable[[Tensor], Tensor | Sequence[Tensor]],
    images: Tensor,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """The gradient of function(images), summed (or weighted by `weights`, output by output), by the images alone.

    It works where gradients are switched off around it, and no parameter ever receives one.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        outputs = function(images)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = [torch.ones_like(output) for output in outputs] if weights is None else weights
        (gradient,) = torch.autograd.grad(outputs, images, grad_outputs=list(weights))
    return gradient


def is_transformed() -> bool:
    """Whether tangents are carried here, or a transform of torch.func is at work: plain autograd would lose either."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def ball(center: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest images of the l-inf ball of radius `eps` around `center`, inside [0, 1].

    Clamping between them is the projection onto both.
    """
    return (center - eps).clamp(min=0), (center + eps).clamp(max=1)


def exact_identity(images: Tensor, purified: Tensor) -> Tensor:
    """`purified`, with the gradient that a purifier of signed steps has towards its input: the identity.

    Such a purifier adds a sum of signs in a ball around what it received, so almost everywhere its Jacobian is
    the identity, except where the clip to [0, 1] binds; there it is zero.
    """
    if not images.requires_grad:
        return purified
    inside = ((purified > 0) & (purified < 1)).to(images.dtype)
    # The second term is zero; it carries the gradient of the pixels where the clip does not bind.
    return purified.detach() + inside * (images - images.detach())
