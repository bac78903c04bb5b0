"""AToP's random transforms (Lin et al., 2024, Eq. 2-4) as plain functions of images, noise and masks.

A mask is float32 (N, 1, P, P) and 1 where a pixel is missing: one minus the paper's m. A missing pixel becomes
0.5, which is the 0 of the papers' [-1, 1]. Noise is clipped to [0, 1] with the image, as in the released code.
"""

from __future__ import annotations

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


def hidden_cell_counts(cells: int, mask_ratio: float) -> int:
    """How many of `cells` a mask hides: exactly floor(ratio * cells), not that many on average."""
    return int(mask_ratio * cells)


def cell_masks(orders: Tensor, cells_per_side: int, size: int, mask_ratio: float, passes: int = 1) -> list[Tensor]:
    """`passes` masks (N, 1, P, P) that hide disjoint sets of floor(ratio * cells) square cells.

    `orders` are permutations (N, cells_per_side**2); pass i hides the cells that stand in its i-th part. With
    RT3's 1 / ratio passes the masks add up to one everywhere. Raises ValueError if the cells do not suffice.
    """
    cells = cells_per_side**2
    hidden = hidden_cell_counts(cells, mask_ratio)
    if hidden * passes > cells:
        raise ValueError(f"{passes} disjoint masks of {hidden} cells need more than {cells} cells")
    side = size // cells_per_side
    masks = list[Tensor]()
    for index in range(passes):
        chosen = orders[:, index * hidden : (index + 1) * hidden]
        flat = torch.zeros(orders.shape, device=orders.device).scatter_(1, chosen, 1.0)
        grid = flat.view(-1, 1, cells_per_side, cells_per_side)
        masks.append(grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3))
    return masks


def draw_masks(
    seeds: Sequence[int], *, size: int, cells_per_side: int, mask_ratio: float, passes: int, device: torch.device
) -> list[Tensor]:
    """Masks whose hidden cells are drawn per image from its own seed; see `cell_masks`."""
    orders = permutations(seeds, cells_per_side**2, device)
    return cell_masks(orders, cells_per_side, size, mask_ratio, passes)


def draw_noise(seeds: Sequence[int], *, size: int, device: torch.device) -> Tensor:
    """Standard normal noise (N, 3, P, P), drawn per image from its own seed."""
    return normal(seeds, (3, size, size), device)


def recombine(filled: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """RT3 (Eq. 4): every pixel from the pass in which it was hidden, sum_i M_i * g(x_t,i)."""
    return torch.stack([image * mask for image, mask in zip(filled, masks, strict=True)]).sum(0)
