from __future__ import annotations

import pytest
import torch

from training.attacks.threats import L2, Linf, Threat, assert_in_budget, norm, unit

THREATS = [Linf(0.1), L2(0.7)]


def images(count: int = 6) -> torch.Tensor:
    drawn = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn[0], drawn[1] = 0.0, 1.0  # there is room on one side only
    return drawn


@pytest.mark.parametrize("threat", THREATS)
def test_starts_are_allowed_random_and_fixed_by_the_generator(threat: Threat) -> None:
    one, same, other = (threat.start(images(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert_in_budget(one, images(), threat, "the start")


@pytest.mark.parametrize("threat", THREATS)
def test_a_projection_is_allowed_and_leaves_what_is_allowed_alone(threat: Threat) -> None:
    far = images() + torch.randn(images().shape, generator=torch.Generator().manual_seed(3))
    projected = threat.project(far, images())
    assert_in_budget(projected, images(), threat, "the projection")
    torch.testing.assert_close(threat.project(projected, images()), projected)
    assert (threat.distances(projected, images())[2:] > 0.5 * threat.eps).all()


def test_an_l2_projection_keeps_the_direction_of_the_change() -> None:
    center = torch.full((2, 3, 8, 8), 0.5)
    change = 0.01 * torch.randn(center.shape, generator=torch.Generator().manual_seed(4))
    projected = L2(0.05).project(center + change, center)
    torch.testing.assert_close(projected - center, 0.05 * unit(change), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("threat", "length"), [(Linf(1.0), 0.2), (L2(1.0), 0.2)])
def test_a_step_has_its_length_whatever_the_gradients_scale(threat: Threat, length: float) -> None:
    gradient = torch.randn(images().shape, generator=torch.Generator().manual_seed(5))
    for scale in (1e-9, 1.0, 1e9):
        moved = threat.move(images(), scale * gradient, 0.2)
        torch.testing.assert_close(threat.distances(moved, images()), torch.full((6,), length))
        assert ((moved - images()) * gradient).flatten(1).sum(1).min() > 0


@pytest.mark.parametrize("threat", THREATS)
def test_no_gradient_is_no_step(threat: Threat) -> None:
    assert torch.equal(threat.move(images(), torch.zeros_like(images()), 0.2), images())


def test_norms_are_per_image() -> None:
    values = torch.stack([torch.full((3, 2, 2), 1.0), torch.zeros(3, 2, 2)])
    torch.testing.assert_close(norm(values).flatten(), torch.tensor([12**0.5, 0.0]))
    assert torch.equal(unit(values)[1], values[1])


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        (torch.full((1, 3, 4, 4), 0.62), "left its budget"),
        (torch.full((1, 3, 4, 4), 1.01), r"left \[0, 1\]"),
        (torch.full((1, 3, 4, 4), float("nan")), r"left \[0, 1\]"),
    ],
)
def test_an_attack_that_leaves_its_budget_is_found_out(moved: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_in_budget(moved, torch.full((1, 3, 4, 4), 0.5), Linf(0.1), "the attack")
