"""AToP's purifier: a random transform, then a network that restores what it removed (Lin et al., 2024, Eq. 1).

t(x) and g run at the working size: images are enlarged bilinearly on the way in and averaged by area on the
way out, inside the purifier, so that classifiers, attacks and budgets speak of the native image alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import transforms
from models.deepfill import DeepFill
from models.mae import MaskedAutoencoder
from models.manifest import AtopPreset, InpainterSpec, MaeSpec
from models.stages import stage
from models.unet import UNet


def build_inpainter(spec: InpainterSpec | MaeSpec) -> nn.Module:
    """A freshly initialized in-painter: (masked images, mask) -> stage outputs, coarse to fine."""
    match spec:
        case MaeSpec():
            return MaskedAutoencoder(spec)
        case InpainterSpec(architecture="deepfill"):
            return DeepFill(width=spec.width)
        case InpainterSpec():
            return UNet(width=spec.width, space_to_depth=spec.space_to_depth)


class AtopPurifier(nn.Module):
    """g(t(x)) for one transform preset; differentiable through transform and network."""

    def __init__(self, inpainter: nn.Module, preset: AtopPreset) -> None:
        super().__init__()
        self.inpainter = inpainter
        self.preset = preset

    @property
    def is_random(self) -> bool:
        return True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Purified images, same shape, in [0, 1]. One seed per image draws its mask and its noise."""
        with stage("transform", images.device):
            masks = self.draw_masks(seeds, images.device)
            noisy = self.noisy(self.enlarge(images), seeds)
            hidden = [transforms.hide(noisy, mask) for mask in masks]
        filled = [self.inpainter(each, mask)[-1] for each, mask in zip(hidden, masks, strict=True)]
        restored = filled[0] if len(filled) == 1 else transforms.recombine(filled, masks)
        return self.shrink(restored.clamp(0, 1), images.shape[-2:])

    def draw_masks(self, seeds: Sequence[int], device: torch.device) -> list[Tensor]:
        """The preset's masks: one, or those of RT3 that partition the cells."""
        preset = self.preset
        orders = transforms.draw_cell_orders(seeds, cells=preset.cells_per_side**2, device=device)
        return transforms.cell_masks(orders, hidden=preset.hidden_cells, size=preset.working_size, passes=preset.passes)

    def noisy(self, enlarged: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images at the working size plus the preset's noise; RT3's passes share it."""
        if self.preset.sigma == 0:
            return enlarged
        noise = transforms.draw_noise(seeds, size=self.preset.working_size, device=enlarged.device)
        return transforms.add_noise(enlarged, noise, self.preset.sigma)

    def enlarge(self, images: Tensor) -> Tensor:
        """Native images to the working size, bilinearly."""
        size = self.preset.working_size
        if images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)

    def shrink(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Working images back to the native size, by area."""
        return images if images.shape[-2:] == tuple(size) else F.interpolate(images, size=tuple(size), mode="area")
