"""ResNet-18, -34 and -50 (He et al., 2016), with stems for 32, 64 and 224+ pixels, as named stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

STAGE_WIDTHS = (64, 128, 256, 512)


def conv_norm(channels_in: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (up to its stride), without bias, and its batch norm."""
    conv = nn.Conv2d(channels_in, channels, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class ResidualBlock(nn.Module):
    """ReLU(branch(x) + shortcut(x)); the shortcut is a 1x1 convolution where shapes change."""

    def __init__(self, branch: nn.Module, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        same_shape = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same_shape else conv_norm(channels_in, channels, 1, stride)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.activation(self.branch(features) + self.shortcut(features))
        return result


def basic_block(channels_in: int, width: int, stride: int) -> ResidualBlock:
    """Two 3x3 convolutions."""
    branch = nn.Sequential(
        conv_norm(channels_in, width, 3, stride),
        nn.ReLU(inplace=True),
        conv_norm(width, width, 3),
    )
    return ResidualBlock(branch, channels_in, width, stride)


def bottleneck_block(channels_in: int, width: int, stride: int) -> ResidualBlock:
    """1x1, 3x3 (with the stride), 1x1 to four times the width."""
    branch = nn.Sequential(
        conv_norm(channels_in, width, 1),
        nn.ReLU(inplace=True),
        conv_norm(width, width, 3, stride),
        nn.ReLU(inplace=True),
        conv_norm(width, 4 * width, 1),
    )
    return ResidualBlock(branch, channels_in, 4 * width, stride)


def residual_stem(input_size: int, channels: int) -> nn.Sequential:
    """The first layers: 3x3 below 64 pixels, 3x3 stride 2 below 224, then 7x7 stride 2 and a max pool."""
    if input_size < 64:
        return nn.Sequential(conv_norm(3, channels, 3), nn.ReLU(inplace=True))
    if input_size < 224:
        return nn.Sequential(conv_norm(3, channels, 3, stride=2), nn.ReLU(inplace=True))
    return nn.Sequential(
        conv_norm(3, channels, 7, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def resnet(
    block: Literal["basic", "bottleneck"], depths: Sequence[int], num_classes: int, input_size: int
) -> dict[str, nn.Module]:
    """The stages of a ResNet: stem, stage1 to stage4, pool, head."""
    make_block, expansion = {"basic": (basic_block, 1), "bottleneck": (bottleneck_block, 4)}[block]
    stages: dict[str, nn.Module] = {"stem": residual_stem(input_size, STAGE_WIDTHS[0])}
    channels = STAGE_WIDTHS[0]
    for index, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True), start=1):
        blocks = list[nn.Module]()
        for position in range(depth):
            stride = 2 if position == 0 and index > 1 else 1
            blocks.append(make_block(channels, width, stride))
            channels = width * expansion
        stages[f"stage{index}"] = nn.Sequential(*blocks)
    stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages["head"] = nn.Linear(channels, num_classes)
    return stages
