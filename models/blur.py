"""The blur operators of ZeroPur, with reflected borders."""

from __future__ import annotations

import math

from kornia.filters import gaussian_blur2d, median_blur
from torch import Tensor

from models.manifest import BlurSpec


def blur(images: Tensor, spec: BlurSpec) -> Tensor:
    """Blur images (N, C, H, W); same shape.

    A Gaussian's kernel reaches three standard deviations, 2 * ceil(3 sigma) + 1 pixels. Neither paper nor code
    gives kernel size or border.
    """
    if spec.kind == "gaussian":
        side = 2 * math.ceil(3 * spec.size) + 1
        return gaussian_blur2d(images, (side, side), (spec.size, spec.size), border_type="reflect")
    side = int(spec.size)
    return median_blur(images, (side, side))  # reflects the border too
