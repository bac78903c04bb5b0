from __future__ import annotations

import torch
from torch import Tensor, nn

from models.gradients import ball, exact_identity, input_gradient


def test_the_gradient_is_the_image_s_own_and_works_where_gradients_are_off() -> None:
    images = torch.rand(3, 1, 2, 2)

    with torch.no_grad():
        gradient = input_gradient(lambda x: x.square().flatten(1).sum(1), images)

    assert torch.allclose(gradient, 2 * images)
    assert not images.requires_grad


def test_weights_multiply_the_outputs_they_belong_to() -> None:
    images = torch.rand(1, 1, 2, 2)
    weights = [torch.full_like(images, 3.0), torch.full_like(images, -1.0)]

    gradient = input_gradient(lambda x: [x, 2 * x], images, weights)

    assert torch.equal(gradient, torch.full_like(images, 1.0))


def test_no_parameter_receives_a_gradient() -> None:
    network = nn.Conv2d(3, 2, 1)

    def function(images: Tensor) -> Tensor:
        result: Tensor = network(images).flatten(1).sum(1)
        return result

    gradient = input_gradient(function, torch.rand(1, 3, 2, 2))

    assert bool((gradient != 0).any())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_clamping_to_a_ball_projects_on_it_and_on_the_range() -> None:
    center = torch.tensor([0.0, 0.5, 0.95])
    moved = torch.tensor([-0.3, 0.9, 1.5])

    assert moved.clamp(*ball(center, 0.1)).tolist() == torch.tensor([0.0, 0.6, 1.0]).tolist()


def test_exact_identity_passes_the_gradient_except_where_the_range_clips() -> None:
    images = torch.tensor([0.5, 0.02, 0.98], requires_grad=True)
    purified = torch.tensor([0.6, 0.0, 1.0])

    result = exact_identity(images, purified)
    result.sum().backward()

    assert torch.equal(result.detach(), purified)
    assert images.grad is not None
    assert images.grad.tolist() == [1.0, 0.0, 0.0]
