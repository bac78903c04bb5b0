"""ResNet-9: the network of Page's DAWNBench entry (2018), which two cores can train adversarially.

SpeedNet is not for that: on CIFAR-10, batches of 256, it overfitted to the attack within four epochs of N-FGSM (lr
0.2) and within three of two PGD steps of 5/255 (0.1), with none of 512 test images right under PGD-10 at 8/255. We
suspect its whitening stem, which multiplies fine detail by up to 45, and did not look further. Here the stem is
learned. Activations are SiLU: smooth ones make adversarial training stronger (Xie et al., 2020).
"""

from __future__ import annotations

from torch import Tensor, nn


def convolution(channels_in: int, channels: int, *, pooled: bool = False) -> nn.Sequential:
    """3x3 convolution, batch norm, SiLU; then 2x2 max pooling where `pooled`."""
    layers = [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pooled else []))


class Residual(nn.Module):
    """x + f(x), f being two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + self.body(features)
        return result


def resnet9(width: int, num_classes: int, input_size: int) -> dict[str, nn.Module]:
    """The stages of ResNet-9, whose stem has `width` channels (64 as published); 32-pixel images or larger.

    Raises ValueError for smaller images.
    """
    if input_size < 32:
        raise ValueError(f"resnet9 needs images of at least 32 pixels, not {input_size}")
    return {
        "stem": convolution(3, width),
        "stage1": nn.Sequential(convolution(width, 2 * width, pooled=True), Residual(2 * width)),
        "stage2": convolution(2 * width, 4 * width, pooled=True),
        "stage3": nn.Sequential(convolution(4 * width, 8 * width, pooled=True), Residual(8 * width)),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "head": nn.Linear(8 * width, num_classes),
    }
