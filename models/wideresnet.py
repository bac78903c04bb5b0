"""Wide residual networks (Zagoruyko and Komodakis, 2016), pre-activation, as named stages.

The stages end where the papers tap them: `stem` is the first convolution and `stage1` to `stage3` are the
raw outputs of the three groups, before any batch norm or ReLU that follows (seen from AID: conv1, blocks n,
2n, 3n).
"""

from __future__ import annotations

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))).

    Where the shape changes, the shortcut is a 1x1 convolution that starts after the first ReLU.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.activation = nn.ReLU(inplace=True)
        same_shape = stride == 1 and channels_in == channels
        self.shortcut = None if same_shape else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        activated = self.activation(self.norm1(features))
        branch: Tensor = self.conv2(self.activation(self.norm2(self.conv1(activated))))
        if self.shortcut is None:
            return features + branch
        shortcut: Tensor = self.shortcut(activated)
        return shortcut + branch


def wideresnet(depth: int, widen: int, num_classes: int, input_size: int) -> dict[str, nn.Module]:
    """The stages of WRN-`depth`-`widen`: stem, stage1 to stage3, norm, pool, head.

    The stem has stride 1 below 64 pixels, 2 below 224 and 4 (7x7) from there. Raises ValueError unless
    depth is 6n + 4.
    """
    blocks_per_stage, rest = divmod(depth - 4, 6)
    if rest or blocks_per_stage < 1:
        raise ValueError(f"the depth of a wide residual network is 6n + 4, not {depth}")
    stem_stride = 1 if input_size < 64 else 2 if input_size < 224 else 4
    stem_kernel = 7 if stem_stride == 4 else 3
    stages: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 16, stem_kernel, stem_stride, stem_kernel // 2, bias=False)}
    channels = 16
    for index, width in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
        blocks = list[nn.Module]()
        for position in range(blocks_per_stage):
            stride = 2 if position == 0 and index > 1 else 1
            blocks.append(PreActivationBlock(channels, width, stride))
            channels = width
        stages[f"stage{index}"] = nn.Sequential(*blocks)
    stages["norm"] = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages["head"] = nn.Linear(channels, num_classes)
    _initialize(stages)
    return stages


def _initialize(stages: dict[str, nn.Module]) -> None:
    for stage in stages.values():
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
