from __future__ import annotations

import math

import pytest
import torch

from models.blur import blur
from models.manifest import BlurSpec


def gaussian(size: float) -> BlurSpec:
    return BlurSpec(kind="gaussian", size=size)


def median(side: int) -> BlurSpec:
    return BlurSpec(kind="median", size=side)


@pytest.mark.parametrize("spec", [gaussian(0.6), gaussian(1.2), gaussian(2.0), median(3), median(5), median(7)])
def test_shape_stays_and_a_flat_image_stays_flat(spec: BlurSpec) -> None:
    images = torch.full((2, 3, 9, 12), 0.3)

    assert torch.allclose(blur(images, spec), images, atol=1e-6)


def test_an_impulse_becomes_the_sampled_gaussian() -> None:
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1

    row = blur(impulse, gaussian(1.2))[0, 0].sum(0)

    weights = [math.exp(-((x - 7) ** 2) / (2 * 1.2**2)) if abs(x - 7) <= 4 else 0.0 for x in range(15)]
    assert row.tolist() == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-5)


def test_the_median_removes_a_lone_pixel_and_keeps_an_edge() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[..., 4:] = 1
    lone = images.clone()
    lone[0, 0, 3, 1] = 1

    assert torch.equal(blur(lone, median(3)), images)


def test_the_median_of_a_window_is_its_middle_value_with_reflected_borders() -> None:
    images = torch.rand(1, 1, 6, 6)

    blurred = blur(images, median(3))

    assert blurred[0, 0, 2, 3] == images[0, 0, 1:4, 2:5].flatten().median()
    corner = images[0, 0][[1, 0, 1]][:, [1, 0, 1]]  # reflection does not repeat the border
    assert blurred[0, 0, 0, 0] == corner.flatten().median()


def test_a_median_of_side_one_is_the_identity() -> None:
    images = torch.rand(1, 3, 4, 4)

    assert torch.equal(blur(images, median(1)), images)
