"""SpeedNet: a small network that a CPU can train on CIFAR-10.

The shape is that of the CIFAR-10 speed runs (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024): a 2x2
patch-whitening stem, then three blocks that pool early, so that almost all work happens at 16 pixels and
below.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (64, 256, 256)
# The head sees max-pooled features; without this factor its first logits are an order of magnitude too large.
LOGIT_SCALE = 1 / 9


class WhiteningStem(nn.Module):
    """2x2 patches of the image, projected on their principal axes and divided by their deviations.

    `set_whitening` computes the projection from training images, each axis with both signs; training never
    changes it.
    """

    def __init__(self, eps: float = 5e-4) -> None:
        super().__init__()
        self.eps = eps
        self.projection = nn.Conv2d(3, 24, kernel_size=2, bias=True)
        self.projection.weight.requires_grad_(False)
        self.activation = nn.GELU()

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Set the projection from normalized images (N, 3, H, W); a few thousand are enough."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        whitening = (axes / (variances + self.eps).sqrt()).T.reshape(12, 3, 2, 2)
        self.projection.weight.copy_(torch.cat([whitening, -whitening]))
        assert self.projection.bias is not None
        self.projection.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.activation(self.projection(images))
        return features


class SpeedBlock(nn.Module):
    """Convolution, 2x2 max pool, BN, GELU; then two convolutions with BN and GELU around which the signal can skip."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.activation = nn.GELU()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(channels) for _ in range(3))
        for conv in (self.conv1, self.conv2, self.conv3):
            # The first channels start as the identity: at initialization the signal reaches the head unharmed.
            nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.activation(self.norm1(self.pool(self.conv1(features))))
        inner = self.activation(self.norm2(self.conv2(pooled)))
        result: Tensor = self.activation(pooled + self.norm3(self.conv3(inner)))
        return result


class ScaledLinear(nn.Linear):
    """A linear layer whose logits are multiplied by `LOGIT_SCALE`."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * LOGIT_SCALE


def speednet(num_classes: int, input_size: int) -> dict[str, nn.Module]:
    """The stages of SpeedNet; made for 32-pixel images (161 MMAC), it accepts any size from 18 up."""
    if input_size < 18:
        raise ValueError(f"speednet needs images of at least 18 pixels, not {input_size}")
    channels = (24, *WIDTHS)
    blocks = [SpeedBlock(a, b) for a, b in pairwise(channels)]
    return {
        "stem": WhiteningStem(),
        **{f"stage{i}": block for i, block in enumerate(blocks, start=1)},
        "pool": nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        "head": ScaledLinear(WIDTHS[-1], num_classes, bias=False),
    }
