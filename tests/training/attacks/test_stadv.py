from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.defense import DefendedClassifier
from tests.fakes import linear_classifier
from tests.networks import SIZE, sensitive, tiny_classifier
from training.attacks.looks import Looks
from training.attacks.pgd import margin
from training.attacks.stadv import bent, stadv, unevenness

IMAGES = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
STRAIGHT = F.affine_grid(torch.eye(2, 3).expand(4, 2, 3), [4, 3, SIZE, SIZE], False)


def test_no_flow_is_the_image_and_a_flow_of_one_pixel_shifts_it() -> None:
    torch.testing.assert_close(bent(IMAGES, STRAIGHT, torch.zeros_like(STRAIGHT)), IMAGES)
    one_pixel = torch.zeros_like(STRAIGHT)
    one_pixel[..., 0] = 2 / SIZE
    torch.testing.assert_close(bent(IMAGES, STRAIGHT, one_pixel)[..., :-1], IMAGES[..., 1:], atol=1e-5, rtol=0)


def test_a_shift_is_even_and_a_tear_is_not() -> None:
    shift, tear = torch.full_like(STRAIGHT, 0.02), torch.zeros_like(STRAIGHT)
    tear[:, : SIZE // 2] = 0.02
    assert unevenness(shift).max() < 0.03  # only the term that keeps the root differentiable
    torch.testing.assert_close(
        unevenness(tear) - unevenness(shift), torch.full((4,), (SIZE - 1) * 0.02 * 2**0.5), atol=2e-3, rtol=0
    )


class Same(nn.Module):
    """Calls itself random and is not."""

    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images


def test_what_fools_a_random_defense_barely_is_pushed_on() -> None:
    classifier = sensitive(tiny_classifier(), IMAGES)
    wrong = (classifier(IMAGES).argmax(1) + 1) % 4  # every margin is positive from the start
    plain, called_random = (DefendedClassifier(classifier, chain) for chain in ([], [Same()]))
    stopped, went_on = (
        margin(classifier(stadv(defended, IMAGES, wrong, Looks(0, range(4)), steps=20)), wrong)
        for defended in (plain, called_random)
    )
    assert (went_on > stopped).all()


@pytest.mark.parametrize(("share", "turned"), [(0.97, False), (1.03, True)])
def test_it_fools_just_outside_the_known_margin_and_never_inside(share: float, turned: bool) -> None:
    """Images that brighten evenly from left to right: every pixel taken d to the right adds d slopes, no flow more."""
    side, slope, pixels = 16, 0.02, 1.5
    ramp = (0.3 + slope * torch.arange(side)).expand(2, 3, side, side).contiguous()
    inner = torch.zeros(3, side, side)
    inner[:, 2:-2, 2:-2] = 1.0  # the edge, from beyond which nothing comes, does not count
    level, a_slope = float((ramp[0] * inner).sum()), slope * float(inner.sum())
    weight = torch.stack([torch.zeros(3 * side * side), inner.flatten()])
    for direction, label in ((1, 0), (-1, 1)):  # too dark for class 1 by so many pixels' slopes, or bright enough
        bias = torch.tensor([level + direction * pixels * a_slope, 0.0])
        defended = DefendedClassifier(linear_classifier(weight, bias), [])
        labels = torch.full((2,), label)
        assert (defended(ramp).argmax(1) == labels).all()
        bound = share * pixels * 2 / side  # as a share of half the side
        moved = stadv(defended, ramp, labels, Looks(0, range(2)), bound=bound, steps=100)
        assert (defended(moved).argmax(1) != labels).tolist() == [turned, turned]


def test_it_raises_the_margin_by_moving_pixels_no_further_than_the_bound() -> None:
    defended = DefendedClassifier(tiny_classifier(), [])
    labels = defended(IMAGES).argmax(1)

    moved = stadv(defended, IMAGES, labels, Looks(0, range(4)), bound=0.2, steps=20)

    assert (margin(defended(moved), labels) > margin(defended(IMAGES), labels)).all()
    assert torch.equal(moved, moved.clamp(0, 1))
    still = stadv(defended, IMAGES, labels, Looks(0, range(4)), bound=0.0, steps=3)
    torch.testing.assert_close(still, IMAGES)
    # A pixel comes from within a fifth of half the side: 1.6 pixels, so never from outside a 5 x 5 window.
    reach = F.max_pool2d(F.pad(IMAGES, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    assert (moved <= reach + 1e-5).all()
