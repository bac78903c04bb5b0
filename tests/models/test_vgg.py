from __future__ import annotations

import pytest
import torch
from torch import nn

from models.vgg import vgg19


def test_it_has_the_sixteen_convolutions_of_vgg19() -> None:
    with torch.device("meta"):
        stages = vgg19(10, 32)
    convs = [m for stage in stages.values() for m in stage.modules() if isinstance(m, nn.Conv2d)]

    assert [conv.out_channels for conv in convs] == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert {conv.kernel_size for conv in convs} == {(3, 3)}
    assert [conv.in_channels for conv in convs][:4] == [3, 64, 64, 128]
    # The known 20,040,522 of this layout, less the 5,504 convolution biases that batch norm makes idle.
    assert sum(p.numel() for stage in stages.values() for p in stage.parameters()) == 20_040_522 - 5_504


@pytest.mark.parametrize("input_size", [32, 64, 224])
def test_each_stage_halves_the_size(input_size: int) -> None:
    with torch.device("meta"):
        stages = vgg19(7, input_size)
        features = torch.empty(2, 3, input_size, input_size)
        found = [(features := stage(features)).shape for stage in stages.values()]

    widths = [64, 128, 256, 512, 512]
    sides = [input_size // 2**stage for stage in range(1, 6)]
    assert found[:5] == [(2, width, side, side) for width, side in zip(widths, sides, strict=True)]
    assert found[5:] == [(2, 512), (2, 7)]
    assert list(stages) == ["stage1", "stage2", "stage3", "stage4", "stage5", "pool", "head"]


def double_in_norms(module: nn.Module) -> None:
    """Let every batch norm of a fresh network, in evaluation mode, multiply by 2."""
    for norm in module.eval().modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, 2 * (1 + norm.eps) ** 0.5)


def test_a_stage_is_convolution_norm_relu_and_a_max_pool() -> None:
    stage = vgg19(7, 32)["stage1"]
    double_in_norms(stage)
    images = torch.rand(2, 3, 8, 8)
    weights = [module.weight for module in stage.modules() if isinstance(module, nn.Conv2d)]

    expected = images
    for weight in weights:
        expected = (nn.functional.conv2d(expected, weight, padding=1) * 2).relu()

    torch.testing.assert_close(stage(images), nn.functional.max_pool2d(expected, 2))


def test_images_below_32_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 31"):
        vgg19(10, 31)
