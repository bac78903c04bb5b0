"""What an attacker may do to an image: balls of radius `eps` around it, cut off at [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.gradients import ball

TINY = 1e-12
"""Below it a norm counts as zero."""


class Threat(Protocol):
    """A set of allowed images around each image (N, 3, H, W)."""

    @property
    def eps(self) -> float: ...

    def start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random allowed image for each."""

    def move(self, moved: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """A step of length `step_size` up the gradient; it may leave the ball."""

    def project(self, moved: Tensor, images: Tensor) -> Tensor:
        """`moved` brought back into the ball around `images`, and into [0, 1]."""

    def distances(self, moved: Tensor, images: Tensor) -> Tensor:
        """How far each image is from where it was, (N,), in the unit of `eps`."""


@dataclass(frozen=True, slots=True)
class Linf:
    """No value moves by more than `eps`."""

    eps: float

    def start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in what [0, 1] leaves of the ball."""
        lower, upper = ball(images, self.eps)
        return torch.lerp(lower, upper, torch.rand(images.shape, generator=generator).to(images.device))

    def move(self, moved: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Every value by `step_size`, as the gradient's sign says."""
        return moved + step_size * gradient.sign()

    def project(self, moved: Tensor, images: Tensor) -> Tensor:
        """Exact: the nearest allowed image."""
        return torch.clamp(moved, *ball(images, self.eps))

    def distances(self, moved: Tensor, images: Tensor) -> Tensor:
        """The largest difference of any value."""
        return (moved - images).abs().flatten(1).amax(1)


@dataclass(frozen=True, slots=True)
class L2:
    """The Euclidean length of the change, over all values of an image, is at most `eps`."""

    eps: float

    def start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """In a uniform direction, at a uniform distance."""
        direction = torch.randn(images.shape, generator=generator).to(images.device)
        radius = self.eps * torch.rand(len(images), generator=generator).to(images.device)
        return self.project(images + radius.view(-1, 1, 1, 1) * unit(direction), images)

    def move(self, moved: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Along the gradient; not at all where it is zero."""
        return moved + step_size * unit(gradient)

    def project(self, moved: Tensor, images: Tensor) -> Tensor:
        """Shortened to the ball's radius, then clipped to [0, 1], which cannot leave the ball again."""
        change = moved - images
        length = norm(change)
        return (images + change * (self.eps / length.clamp(min=self.eps))).clamp(0, 1)

    def distances(self, moved: Tensor, images: Tensor) -> Tensor:
        """The Euclidean length of the change."""
        return norm(moved - images).flatten()


def norm(values: Tensor) -> Tensor:
    """Euclidean length of each image's values, (N, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(values, dim=(1, 2, 3), keepdim=True)
    return length


def unit(values: Tensor) -> Tensor:
    """Each image's values divided by their length; zero where it is zero."""
    length = norm(values)
    return torch.where(length > TINY, values / length.clamp(min=TINY), torch.zeros_like(values))


def assert_in_budget(moved: Tensor, images: Tensor, threat: Threat, what: str) -> None:
    """Raise AssertionError unless every image is in range and in its budget."""
    assert torch.equal(moved, moved.clamp(0, 1)), f"{what} left [0, 1]"
    assert float(threat.distances(moved, images).max()) <= threat.eps + 1e-6, f"{what} left its budget"
