from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models.speednet import LOGIT_SCALE, ScaledLinear, SpeedBlock, WhiteningStem, speednet


@pytest.fixture(autouse=True)
def fixed_weights_and_images() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def correlated_images(count: int) -> Tensor:
    """Images around zero whose channels and neighboring pixels resemble each other, as in photographs."""
    noise = torch.randn(count, 3, 13, 13)
    smooth = nn.functional.avg_pool2d(noise, 2, stride=1) + 0.2 * noise[..., 1:, 1:]
    return smooth + smooth.mean(dim=1, keepdim=True)


def covariance(features: Tensor) -> Tensor:
    """Of the channels, over all images and places."""
    return torch.cov(features.transpose(0, 1).flatten(1))


def test_whitening_makes_the_axes_of_patches_uncorrelated_and_of_variance_one() -> None:
    stem, images = WhiteningStem(), correlated_images(2000)
    raw_patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    assert covariance(raw_patches).fill_diagonal_(0).max() > 0.3

    stem.set_whitening(images)

    whitened = covariance(stem.projection(images)[:, :12])
    torch.testing.assert_close(whitened, torch.eye(12), rtol=0, atol=0.02)


def test_each_axis_comes_with_both_signs() -> None:
    stem, images = WhiteningStem(), correlated_images(100)

    stem.set_whitening(images)

    projected = stem.projection(images)
    assert projected.std() > 0.5
    torch.testing.assert_close(projected[:, 12:], -projected[:, :12])
    torch.testing.assert_close(stem(images), nn.functional.gelu(projected))


def test_directions_without_variance_are_not_blown_up() -> None:
    grey = correlated_images(100).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    stem = WhiteningStem(eps=0.01)

    stem.set_whitening(grey)

    # A unit axis divided by sqrt(variance + eps); for differences between channels, eps is all there is.
    norms = stem.projection.weight.flatten(1).norm(dim=1)
    assert norms.max().item() == pytest.approx(10, rel=1e-2)
    assert norms.min() < 2


def test_training_never_moves_the_whitening() -> None:
    stem = WhiteningStem()
    stem.set_whitening(correlated_images(10))

    torch.autograd.backward(stem(correlated_images(2)).sum())

    assert stem.projection.weight.grad is None
    assert stem.projection.bias is not None
    assert stem.projection.bias.grad is not None


def test_the_first_channels_of_a_fresh_convolution_hand_their_input_on() -> None:
    block = SpeedBlock(3, 8)
    features = torch.randn(2, 3, 6, 6)

    torch.testing.assert_close(block.conv1(features)[:, :3], features)
    wide = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block.conv2(wide), wide)
    torch.testing.assert_close(block.conv3(wide), wide)


def test_a_block_is_a_pooled_convolution_and_a_residual_of_two_more() -> None:
    block = SpeedBlock(3, 3).eval()
    block.norm1.weight = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))  # below 0: the pool must come first
    block.norm2.weight = nn.Parameter(torch.tensor([3.0, 2.0, 1.0]))
    block.norm3.weight = nn.Parameter(torch.tensor([0.5, 2.0, -1.0]))
    features = torch.randn(2, 3, 6, 6)

    result = block(features)

    # A fresh convolution is the identity, a fresh batch norm in evaluation mode multiplies by its weight.
    first, second, third = (norm.weight.view(3, 1, 1) for norm in (block.norm1, block.norm2, block.norm3))
    pooled = nn.functional.gelu(nn.functional.max_pool2d(features, 2) * first)
    inner = nn.functional.gelu(pooled * second)
    expected = nn.functional.gelu(pooled + inner * third)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


def test_logits_are_scaled_down() -> None:
    head, features = ScaledLinear(4, 3, bias=False), torch.randn(2, 4)

    torch.testing.assert_close(head(features), LOGIT_SCALE * features @ head.weight.T)


@pytest.mark.parametrize(("input_size", "sides"), [(18, [17, 8, 4, 2]), (32, [31, 15, 7, 3]), (64, [63, 31, 15, 7])])
def test_every_block_halves_the_size(input_size: int, sides: list[int]) -> None:
    with torch.device("meta"):
        stages = speednet(10, input_size)
        features = torch.empty(2, 3, input_size, input_size)
        found = [(features := stage.eval()(features)).shape for stage in stages.values()]

    channels = [24, 64, 256, 256]
    assert found[:4] == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert found[4:] == [(2, 256), (2, 10)]
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "pool", "head"]


def test_the_embedding_is_the_largest_value_of_each_channel() -> None:
    features = torch.randn(2, 256, 3, 3)

    torch.testing.assert_close(speednet(10, 32)["pool"](features), features.amax(dim=(2, 3)))


def test_images_below_18_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 17"):
        speednet(10, 17)
