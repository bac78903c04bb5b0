"""AToP's random transforms (Lin et al., 2024, Eq. 2-4) as plain functions of images, noise and masks.

A mask is float32 (N, 1, P, P) and 1 where a pixel is missing: one minus the paper's m. A missing pixel becomes
0.5, which is the 0 of the papers' [-1, 1]. Noise is clipped to [0, 1] with the image, as in the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.randomness import normal, permutations

MISSING = 0.5


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Replace missing pixels by mid-grey: (1 - M) * x + M / 2. The whole of RT1 (Eq. 2)."""
    return images * (1 - mask) + MISSING * mask


def add_noise(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x + sigma * eta, clipped to [0, 1]; eta is standard normal (N, 3, P, P). With `hide`, RT2 (Eq. 3)."""
    return (images + sigma * noise).clamp(0, 1)


def cell_masks(orders: Tensor, *, hidden: int, size: int, passes: int = 1) -> list[Tensor]:
    """`passes` masks (N, 1, P, P) that hide disjoint sets of `hidden` square cells each.

    `orders` are permutations (N, side**2) of the cells; pass i hides those that stand in its i-th part. Where
    hidden * passes is the number of cells (RT3), the masks add up to one everywhere. Raises ValueError if the cells
    do not suffice.
    """
    cells = orders.shape[1]
    if hidden * passes > cells:
        raise ValueError(f"{passes} disjoint masks of {hidden} cells need more than {cells} cells")
    cells_per_side = math.isqrt(cells)
    side = size // cells_per_side
    masks = list[Tensor]()
    for index in range(passes):
        chosen = orders[:, index * hidden : (index + 1) * hidden]
        flat = torch.zeros(orders.shape, device=orders.device).scatter_(1, chosen, 1.0)
        grid = flat.view(-1, 1, cells_per_side, cells_per_side)
        masks.append(grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3))
    return masks


def draw_cell_orders(seeds: Sequence[int], *, cells: int, device: torch.device) -> Tensor:
    """Permutations of the cells, int64 (N, cells), drawn per image from its own seed."""
    return permutations(seeds, cells, device)


def draw_noise(seeds: Sequence[int], *, size: int, device: torch.device) -> Tensor:
    """Standard normal noise (N, 3, P, P), drawn per image from its own seed."""
    return normal(seeds, (3, size, size), device)


def recombine(filled: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """RT3 (Eq. 4): every pixel from the pass in which it was hidden, sum_i M_i * g(x_t,i)."""
    return torch.stack([image * mask for image, mask in zip(filled, masks, strict=True)]).sum(0)
