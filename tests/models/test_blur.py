from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from models.blur import blur, differences, divergence, magnitude
from models.manifest import BlurSpec


def gaussian(size: float) -> BlurSpec:
    return BlurSpec(kind="gaussian", size=size)


def median(side: int) -> BlurSpec:
    return BlurSpec(kind="median", size=side)


def tv(weight: float) -> BlurSpec:
    return BlurSpec(kind="tv", size=weight)


BLURS = [gaussian(0.6), gaussian(1.2), gaussian(2.0), median(3), median(5), median(7), tv(0.03), tv(0.1), tv(2.0)]


@pytest.mark.parametrize("spec", BLURS)
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


# Total-variation minimization


def noisy_squares(count: int = 4) -> Tensor:
    """A bright rectangle, another one in each channel, in noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((count, 3, 12, 16), 0.2)
    for channel in range(3):
        images[:, channel, 2:9, 3 : 8 + 2 * channel] = 0.8
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def total_variation(images: Tensor) -> Tensor:
    """By its definition, pixel by pixel; (N,)."""
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1), mode="replicate")
    down, right = padded[..., 1:, :-1] - images, padded[..., :-1, 1:] - images
    return (down**2 + right**2).sqrt().flatten(1).sum(1)


def energy(images: Tensor, received: Tensor, weight: float) -> Tensor:
    return (images - received).square().flatten(1).sum(1) / 2 + weight * total_variation(images)


@pytest.mark.parametrize(("weight", "tolerance"), [(0.03, 1e-3), (0.1, 2e-3), (0.3, 5e-3)])
def test_tv_is_the_solution_that_chambolle_s_algorithm_converges_to(weight: float, tolerance: float) -> None:
    images = noisy_squares(2)

    expected = [
        denoise_tv_chambolle(  # type: ignore[no-untyped-call]
            image, weight=weight, eps=1e-12, max_num_iter=3000, channel_axis=0
        )
        for image in images.double().numpy()
    ]

    np.testing.assert_allclose(blur(images, tv(weight)), np.stack(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("weight", [0.03, 0.1, 0.3])
def test_no_image_nearby_has_less_of_what_tv_minimizes(weight: float) -> None:
    received, generator = noisy_squares(), torch.Generator().manual_seed(1)
    blurred = blur(received, tv(weight))
    least = energy(blurred, received, weight)

    assert bool((least < 0.9 * energy(received, received, weight)).all())
    for size in (0.3, 0.1, 0.03):
        for other in (received, torch.randn(received.shape, generator=generator)):
            moved = torch.lerp(blurred, other, size)
            assert bool((energy(moved, received, weight) > least).all())


def test_tv_lowers_a_step_by_its_weight_over_the_width_of_each_side_and_keeps_its_place() -> None:
    step = torch.zeros(1, 1, 6, 10)
    step[..., 4:] = 1

    blurred = blur(step, tv(0.1))

    expected = torch.full((1, 1, 6, 10), 0.1 / 4)
    expected[..., 4:] = 1 - 0.1 / 6
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-3)


def test_tv_of_almost_no_weight_is_the_identity_and_of_much_weight_the_mean() -> None:
    images = noisy_squares()

    assert torch.allclose(blur(images, tv(1e-6)), images, atol=1e-5)
    means = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    assert torch.allclose(blur(images, tv(100.0)), means, atol=0.02)


@pytest.mark.parametrize("weight", [0.01, 0.1, 1.0])
def test_tv_stays_in_range_and_never_raises_the_total_variation(weight: float) -> None:
    coins = torch.randint(0, 2, (4, 3, 9, 12), generator=torch.Generator().manual_seed(0)).float()
    for images in (coins, noisy_squares()):
        blurred = blur(images, tv(weight))

        assert blurred.dtype == torch.float32
        assert bool(((blurred >= 0) & (blurred <= 1)).all())
        assert bool((total_variation(blurred) < total_variation(images)).all())


def test_tv_of_an_image_and_a_channel_does_not_depend_on_the_others() -> None:
    images = noisy_squares()

    blurred = blur(images, tv(0.1))

    assert not torch.equal(blurred[1], blurred[2])
    assert torch.equal(blurred[2:3], blur(images[2:3], tv(0.1)))
    assert torch.equal(blurred[:, 1:2], blur(images[:, 1:2], tv(0.1)))


def test_no_gradient_flows_through_tv_and_what_it_is_given_stays_as_it_was() -> None:
    images = noisy_squares().requires_grad_()
    before = images.detach().clone()

    assert not blur(images, tv(0.1)).requires_grad
    assert torch.equal(images, before)


def test_the_divergence_is_the_negative_adjoint_of_the_differences() -> None:
    images, field = torch.rand(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 2, 3, 5, 7, dtype=torch.float64)
    field[0, ..., -1, :] = 0
    field[1, ..., -1] = 0

    torch.testing.assert_close((differences(images) * field).sum(), -(images * divergence(field)).sum())
    torch.testing.assert_close(magnitude(differences(images)).flatten(1).sum(1), total_variation(images))
