from __future__ import annotations

import pytest
import torch
from torch import nn

from models.wideresnet import PreActivationBlock, wideresnet


@pytest.mark.parametrize(
    ("depth", "widen", "expected"),
    [
        (16, 2, 691_674),
        (16, 4, 2_748_890),
        (28, 2, 1_467_610),
        (28, 10, 36_479_194),
        (34, 10, 46_160_474),
        (70, 16, 266_796_506),
    ],
)
def test_the_well_known_networks_have_their_well_known_number_of_parameters(
    depth: int, widen: int, expected: int
) -> None:
    with torch.device("meta"):
        stages = wideresnet(depth, widen, 10, 32)

    assert sum(parameter.numel() for stage in stages.values() for parameter in stage.parameters()) == expected


@pytest.mark.parametrize(
    ("input_size", "sides"),
    [(32, [32, 32, 16, 8]), (64, [32, 32, 16, 8]), (224, [56, 56, 28, 14])],
)
def test_the_stem_brings_every_size_down_to_where_the_stages_start(input_size: int, sides: list[int]) -> None:
    with torch.device("meta"):
        stages = wideresnet(10, 2, 5, input_size)
        features = torch.empty(2, 3, input_size, input_size)
        found = [(features := stage(features)).shape for stage in stages.values()]

    channels = [16, 32, 64, 128]
    assert found[:4] == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert found[4:] == [(2, 128, sides[-1], sides[-1]), (2, 128), (2, 5)]
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "norm", "pool", "head"]


@pytest.mark.parametrize(("input_size", "kernel_size"), [(32, 3), (64, 3), (224, 7)])
def test_large_images_get_a_large_first_convolution(input_size: int, kernel_size: int) -> None:
    stem = wideresnet(10, 1, 5, input_size)["stem"]

    assert isinstance(stem, nn.Conv2d)
    assert stem.kernel_size == (kernel_size, kernel_size)


@pytest.mark.parametrize("depth", [4, 12, 27, -2])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"6n \\+ 4, not {depth}"):
        wideresnet(depth, 2, 10, 32)


def double_in_norms(module: nn.Module) -> None:
    """Let every batch norm of a fresh network, in evaluation mode, multiply by 2."""
    for norm in module.eval().modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, 2 * (1 + norm.eps) ** 0.5)


def test_a_block_whose_branch_is_silent_hands_its_input_on() -> None:
    block = PreActivationBlock(4, 4, 1)
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(2, 4, 6, 6)

    assert torch.equal(block(features), features)


def test_where_the_shape_changes_the_shortcut_starts_after_the_first_activation() -> None:
    block = PreActivationBlock(3, 8, 2)
    double_in_norms(block)
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(2, 3, 6, 6)

    result = block(features)

    assert block.shortcut is not None
    activated = (features * 2).relu()
    torch.testing.assert_close(result, nn.functional.conv2d(activated, block.shortcut.weight, stride=2))


def test_a_branch_is_norm_relu_convolution_twice() -> None:
    block = PreActivationBlock(4, 4, 1)
    double_in_norms(block)
    features = torch.randn(2, 4, 6, 6)

    branch = nn.functional.conv2d((features * 2).relu(), block.conv1.weight, padding=1)
    branch = nn.functional.conv2d((branch * 2).relu(), block.conv2.weight, padding=1)

    torch.testing.assert_close(block(features), features + branch)


def test_stages_end_in_raw_sums_and_only_the_norm_stage_activates() -> None:
    stages = wideresnet(10, 1, 5, 32)
    features = torch.randn(2, 3, 16, 16)

    for name in ("stem", "stage1", "stage2", "stage3"):
        features = stages[name](features)
        assert features.min() < 0, name

    assert stages["norm"](features).min() == 0


def test_fresh_convolutions_keep_the_variance_by_fan_out_and_the_heads_bias_is_zero() -> None:
    stages = wideresnet(10, 4, 5, 32)
    conv = next(module for module in stages["stage3"].modules() if isinstance(module, nn.Conv2d))
    head = stages["head"]

    assert conv.weight.shape == (256, 128, 3, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert isinstance(head, nn.Linear)
    assert not head.bias.any()
