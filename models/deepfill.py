"""DeepFill v2 (Yu et al., 2019): an in-painter of two stages, gated convolutions and contextual attention.

The layers are those of the network behind the `up256` setting of AToP (Lin et al., 2024). The coarse stage
guesses what the mask removed; the fine stage repairs that guess twice, once by convolutions alone and once by
pasting patches from what is known of the same image (Yu et al., 2018, "Generative Image Inpainting with
Contextual Attention"), and joins the two. Inside, images are in [-1, 1], where a missing pixel is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOFTMAX_SCALE = 10.0
NORM_FLOOR = 1e-4  # a patch of zeros has no direction: it is divided by this instead of its norm


class GatedConv(nn.Module):
    """One convolution, its channels split in halves a and b: activation(a) * sigmoid(b); padded to its stride alone."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(channels_in, 2 * channels, kernel_size, stride, padding, dilation)
        nn.init.kaiming_uniform_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        _zero_bias(self.conv)
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        values, gates = self.conv(features).chunk(2, dim=1)
        gated: Tensor = self.activation(values) * gates.sigmoid()
        return gated


def contextual_attention(features: Tensor, mask: Tensor) -> Tensor:
    """Rebuild a feature map from patches of its own known part (Yu et al., 2018).

    Takes features (N, C, P/4, P/4) and mask (N, 1, P, P), 1 = missing; returns features of the same shape.
    The patches of an image form a grid of P/8 x P/8; every one is looked for among all of them, L = (P/8)**2.
    The published code reads one mask for the whole batch; here each image goes by its own.
    """
    scores = fuse(match(features[..., ::2, ::2]))
    attention = attend(scores, known_patches(mask))
    return paste(features, attention)


def match(features: Tensor) -> Tensor:
    """How well the 3x3 patch around each cell matches each other one: scores (N, L background, L foreground).

    The inner product of the foreground patch with the background patch divided by its norm, as published: it
    is no full cosine, so that a strong foreground decides more sharply. Cells beyond the border are zeros.
    """
    foreground = F.unfold(features, kernel_size=3, padding=1)  # (N, 9C, L)
    norms: Tensor = torch.linalg.vector_norm(foreground, dim=1, keepdim=True)
    background = foreground / norms.clamp(min=NORM_FLOOR)
    return background.mT @ foreground


def fuse(scores: Tensor) -> Tensor:
    """Let neighbors agree: a match counts more where the cells around it match the same way around.

    The published layer's two convolutions with a 3x3 identity kernel, one over cells numbered row by row, one
    over cells numbered column by column. As there, the end of a row (column) touches the start of the next.
    """
    rows_agree = _add_diagonal_neighbors(scores)
    columns_agree = _add_diagonal_neighbors(_swap_numbering(rows_agree))
    return _swap_numbering(columns_agree)


def known_patches(mask: Tensor) -> Tensor:
    """Which patches may be copied, (N, L), 1 or 0: those whose 3x3 cells are all known.

    A cell of 8x8 pixels is missing if its upper left pixel is. The squares of RT1 to RT3 are P/8 wide, so
    that at 64, 128 or 256 pixels they are made of whole cells and nothing is lost.
    """
    cells = mask[..., ::8, ::8]
    missing_nearby = F.max_pool2d(cells, kernel_size=3, stride=1, padding=1)
    return 1 - missing_nearby.flatten(1)


def attend(scores: Tensor, known: Tensor) -> Tensor:
    """Softmax over the background (dim 1) in which missing patches have score zero, before and after.

    A foreground patch shares out less than 1 where patches are missing, nothing at all if none is known.
    """
    known = known.unsqueeze(2)
    return F.softmax(SOFTMAX_SCALE * scores * known, dim=1) * known


def paste(features: Tensor, attention: Tensor) -> Tensor:
    """Put the attended mixture of 4x4 patches in place of each patch; each cell lies under four of them."""
    patches = F.unfold(features, kernel_size=4, stride=2, padding=1)  # (N, 16C, L)
    height, width = features.shape[-2:]
    return F.fold(patches @ attention, (height, width), kernel_size=4, stride=2, padding=1) / 4


class FineStage(nn.Module):
    """Repair the coarse result: images (N, 3, P, P) in [-1, 1] and mask to images in [-1, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, twice = width // 2, 2 * width
        self.conv_branch = nn.Sequential(
            GatedConv(3, half, 5),
            _down(half, half, width),
            _down(width, width, twice),
            GatedConv(twice, twice),
            *_dilated_convs(twice),
        )
        self.before_attention = nn.Sequential(
            GatedConv(3, half, 5),
            _down(half, half, width),
            _down(width, twice, twice),
            GatedConv(twice, twice, activation=F.relu),
        )
        self.after_attention = nn.Sequential(GatedConv(twice, twice), GatedConv(twice, twice))
        self.join = nn.Sequential(GatedConv(2 * twice, twice), GatedConv(twice, twice))
        self.decode = _decoder(width)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        imagined = self.conv_branch(images)
        copied = self.after_attention(contextual_attention(self.before_attention(images), mask))
        repaired: Tensor = self.decode(self.join(torch.cat([imagined, copied], dim=1)))
        return repaired


class DeepFill(nn.Module):
    """DeepFill v2: images with missing squares to the coarse and the fine result.

    `width` is the channels of the first half-size map; all layers scale with it, and 48 is the published
    network. Raises ValueError unless it is a positive multiple of 4.

    Made for working images of 64 to 256 pixels. At 32 (`native32`) it runs, but the attention grid is 4x4
    cells of 8 pixels while missing squares are 4 pixels: attention sees only the upper left square of each
    cell, may copy from what is missing, and dilations 8 and 16 see little but padding. For that size there is
    the in-painter of `unet.py`.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"the width of DeepFill is a positive multiple of 4, not {width}")
        self.coarse = _coarse_stage(width)
        self.fine = FineStage(width)

    def forward(self, masked_images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """In-paint images (N, 3, P, P) in [0, 1], 0.5 where missing, by mask (N, 1, P, P), 1 = missing.

        Returns the coarse and the fine result, both (N, 3, P, P) in [0, 1]; neither depends on other images
        of the batch. Raises ValueError unless the images are square and P is a multiple of 8.
        """
        height, width = masked_images.shape[-2:]
        if height != width or height % 8:
            raise ValueError(f"DeepFill needs square images of 8n pixels, not {height} x {width}")
        masked = 2 * masked_images - 1
        coarse = self.coarse(torch.cat([masked, torch.ones_like(mask), mask], dim=1))
        fine = self.fine(coarse * mask + masked * (1 - mask), mask)
        return (coarse + 1) / 2, (fine + 1) / 2


def _coarse_stage(width: int) -> nn.Sequential:
    """From 5 channels (RGB, ones, mask) to RGB, all in [-1, 1]."""
    half, twice = width // 2, 2 * width
    return nn.Sequential(
        GatedConv(5, half, 5),
        _down(half, width, width),
        _down(width, twice, twice),
        GatedConv(twice, twice),
        *_dilated_convs(twice),
        GatedConv(twice, twice),
        GatedConv(twice, twice),
        _decoder(width),
    )


def _down(channels_in: int, hidden: int, channels: int) -> nn.Sequential:
    """Half the size."""
    return nn.Sequential(GatedConv(channels_in, hidden, stride=2), GatedConv(hidden, channels))


def _dilated_convs(channels: int) -> list[GatedConv]:
    return [GatedConv(channels, channels, dilation=dilation) for dilation in (2, 4, 8, 16)]


def _decoder(width: int) -> nn.Sequential:
    """From 2 * width channels at a quarter of the size to RGB in [-1, 1]; the last convolution is ungated."""
    to_rgb = nn.Conv2d(width // 4, 3, 3, padding=1)
    _zero_bias(to_rgb)
    return nn.Sequential(
        _up(2 * width, width, width),
        _up(width, width // 2, width // 4),
        to_rgb,
        nn.Tanh(),
    )


def _up(channels_in: int, hidden: int, channels: int) -> nn.Sequential:
    """Twice the size: the gated deconvolution of the paper, then a gated convolution."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        GatedConv(channels_in, hidden),
        GatedConv(hidden, channels),
    )


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _add_diagonal_neighbors(scores: Tensor) -> Tensor:
    """Add to score (b, f) its neighbors (b - 1, f - 1) and (b + 1, f + 1); zeros beyond the border."""
    padded = F.pad(scores, (1, 1, 1, 1))
    return padded[:, :-2, :-2] + scores + padded[:, 2:, 2:]


def _swap_numbering(scores: Tensor) -> Tensor:
    """Scores (N, L, L) of cells numbered row by row to column by column, and back (grids are square)."""
    count, cells = scores.shape[:2]
    side = math.isqrt(cells)
    grid = scores.reshape(count, side, side, side, side)
    return grid.transpose(1, 2).transpose(3, 4).reshape(count, cells, cells)
