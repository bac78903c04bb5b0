from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from models.resnet import ResidualBlock, basic_block, bottleneck_block, resnet


@pytest.mark.parametrize(
    ("block", "depths", "num_classes", "input_size", "expected"),
    [
        ("basic", (2, 2, 2, 2), 10, 32, 11_173_962),
        ("basic", (3, 4, 6, 3), 10, 32, 21_282_122),
        ("bottleneck", (3, 4, 6, 3), 10, 32, 23_520_842),
        ("basic", (2, 2, 2, 2), 1000, 224, 11_689_512),
        ("basic", (3, 4, 6, 3), 1000, 224, 21_797_672),
        ("bottleneck", (3, 4, 6, 3), 1000, 224, 25_557_032),
    ],
)
def test_the_well_known_networks_have_their_well_known_number_of_parameters(
    block: Literal["basic", "bottleneck"],
    depths: Sequence[int],
    num_classes: int,
    input_size: int,
    expected: int,
) -> None:
    with torch.device("meta"):
        stages = resnet(block, depths, num_classes, input_size)

    assert sum(parameter.numel() for stage in stages.values() for parameter in stage.parameters()) == expected


@pytest.mark.parametrize(
    ("input_size", "sides"),
    [(32, [32, 32, 16, 8, 4]), (64, [32, 32, 16, 8, 4]), (224, [56, 56, 28, 14, 7])],
)
def test_the_stem_brings_every_size_down_to_where_the_stages_start(input_size: int, sides: list[int]) -> None:
    with torch.device("meta"):
        stages = resnet("bottleneck", (1, 1, 1, 1), 10, input_size)
        features = torch.empty(2, 3, input_size, input_size)
        found = [(features := stage(features)).shape for stage in stages.values()]

    channels = [64, 256, 512, 1024, 2048]
    assert found[:5] == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert found[5:] == [(2, 2048), (2, 10)]
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4", "pool", "head"]


def double_in_norms(module: nn.Module) -> None:
    """Let every batch norm of a fresh network, in evaluation mode, multiply by 2."""
    for norm in module.eval().modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, 2 * (1 + norm.eps) ** 0.5)


def silence_branch(block: ResidualBlock) -> None:
    """Let the last batch norm of the branch answer 0."""
    norm = [module for module in block.branch.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    nn.init.zeros_(norm.weight)


@pytest.mark.parametrize("block", [basic_block(16, 16, 1), bottleneck_block(16, 4, 1)])
def test_a_block_without_its_branch_is_relu_of_its_input(block: ResidualBlock) -> None:
    silence_branch(block)
    features = torch.randn(2, 16, 6, 6)

    torch.testing.assert_close(block(features), features.relu())


@pytest.mark.parametrize("block", [basic_block(3, 8, 2), bottleneck_block(3, 2, 2)])
def test_where_the_shape_changes_the_shortcut_is_a_convolution_of_size_one(block: ResidualBlock) -> None:
    double_in_norms(block)
    silence_branch(block)
    features = torch.randn(2, 3, 6, 6)

    result = block(features)

    weight = next(block.shortcut.parameters())
    assert weight.shape == (8, 3, 1, 1)
    torch.testing.assert_close(result, (nn.functional.conv2d(features, weight, stride=2) * 2).relu())


def test_a_stride_alone_changes_the_shape() -> None:
    assert basic_block(4, 4, 2)(torch.randn(2, 4, 6, 6)).shape == (2, 4, 3, 3)


@pytest.mark.parametrize(
    ("block", "kernel_sizes"), [(basic_block(16, 16, 1), [3, 3]), (bottleneck_block(16, 4, 1), [1, 3, 1])]
)
def test_a_block_adds_convolutions_with_norm_and_relu_between_them_to_its_input(
    block: ResidualBlock, kernel_sizes: list[int]
) -> None:
    double_in_norms(block)
    features = torch.randn(2, 16, 6, 6)
    weights = [module.weight for module in block.branch.modules() if isinstance(module, nn.Conv2d)]
    assert [weight.shape[-1] for weight in weights] == kernel_sizes

    branch = features
    for position, weight in enumerate(weights):
        activated = branch.relu() if position > 0 else branch
        branch = nn.functional.conv2d(activated, weight, padding="same") * 2

    torch.testing.assert_close(block(features), (features + branch).relu())


def test_a_block_leaves_its_input_as_it_was() -> None:
    features = torch.randn(1, 4, 6, 6)
    before = features.clone()

    basic_block(4, 4, 1)(features)

    assert torch.equal(features, before)


def test_there_is_one_depth_for_each_of_the_four_stages() -> None:
    with pytest.raises(ValueError, match="zip"):
        resnet("basic", (2, 2, 2), 10, 32)
