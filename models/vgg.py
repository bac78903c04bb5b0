"""VGG19 with batch norm (Simonyan and Zisserman, 2015), as named stages; a source of transfer attacks."""

from __future__ import annotations

from torch import nn

DEPTHS = (2, 2, 4, 4, 4)
WIDTHS = (64, 128, 256, 512, 512)


def vgg19(num_classes: int, input_size: int) -> dict[str, nn.Module]:
    """The stages of VGG19: stage1 to stage5, each ending in a 2x2 max pool, then pool and head.

    Global pooling takes the place of two of the three fully connected layers, so any size from 32 pixels up
    needs no stem of its own. Raises ValueError below, where five poolings leave nothing.
    """
    if input_size < 32:
        raise ValueError(f"vgg19 needs images of at least 32 pixels, not {input_size}")
    stages = dict[str, nn.Module]()
    channels = 3
    for index, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True), start=1):
        layers = list[nn.Module]()
        for _ in range(depth):
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        stages[f"stage{index}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
    stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages["head"] = nn.Linear(channels, num_classes)
    return stages
