from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.resnet9 import Residual, convolution, resnet9


@pytest.mark.parametrize(("width", "input_size"), [(32, 32), (64, 32), (32, 64)])
def test_stages_halve_the_size_and_double_the_channels(width: int, input_size: int) -> None:
    with torch.device("meta"):
        stages = resnet9(width, 10, input_size)
        features = torch.empty(2, 3, input_size, input_size)
        found = [tuple((features := stage.eval()(features)).shape) for stage in stages.values()]
    sides = [(width * 2**level, input_size // 2**level) for level in range(4)]
    assert found == [*((2, channels, side, side) for channels, side in sides), (2, 8 * width), (2, 10)]
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "pool", "head"]


def test_the_published_width_has_the_published_convolutions() -> None:
    with torch.device("meta"):
        stages = resnet9(64, 10, 32)
    convolutions = [module for stage in stages.values() for module in stage.modules() if isinstance(module, nn.Conv2d)]
    channels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert [(conv.in_channels, conv.out_channels) for conv in convolutions] == channels


def test_a_residual_adds_its_input_to_two_convolutions() -> None:
    torch.manual_seed(0)
    block, features = Residual(4).eval(), torch.randn(2, 4, 6, 6)
    first, second = block.body
    torch.testing.assert_close(block(features), features + second(first(features)))
    assert block(features).shape == features.shape


def test_a_convolution_is_normalized_activated_and_pooled_in_this_order() -> None:
    torch.manual_seed(0)
    layers, images = convolution(3, 5, pooled=True), torch.randn(2, 3, 6, 6)
    expected = F.max_pool2d(F.silu(layers[1](layers[0](images))), 2)
    torch.testing.assert_close(layers(images), expected)
    assert layers[0].bias is None


def test_images_below_32_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="not 31"):
        resnet9(64, 10, 31)
