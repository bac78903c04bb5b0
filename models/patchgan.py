"""SN-PatchGAN (Yu et al., 2019): the discriminator that judges in-painted images, and the hinge losses."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores of how real an image looks, one for each feature of each place; spectrally normalized.

    Six 5x5 convolutions of stride 2, each followed by a leaky ReLU; `width` is the channels of the first, 64
    as published. Spectral normalization is PyTorch's: the stored weight is left as it is, the convolution
    sees weight / sigma, and gradients run through sigma too. The public DeepFill code instead overwrites the
    weight by weight / sigma at each forward pass, unseen by autograd and by the optimizer's moments. Both
    estimate sigma by one power iteration per forward pass; here only in training mode, so that evaluation
    changes nothing.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        channels = (4, width, 2 * width, 4 * width, 4 * width, 4 * width, 4 * width)
        layers = list[nn.Module]()
        for channels_in, channels_out in pairwise(channels):
            layers += [
                spectral_norm(nn.Conv2d(channels_in, channels_out, kernel_size=5, stride=2, padding=2)),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Scores (N, L) of images (N, 3, P, P) in [0, 1] with their mask (N, 1, P, P), 1 = was missing.

        Each convolution halves the size, rounding up, so any P will do; L is 4 * width * ceil(P / 64)**2.
        """
        scores: Tensor = self.layers(torch.cat([2 * images - 1, mask], dim=1))
        return scores.flatten(1)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the discriminator minimizes: real scores below 1 and fake scores above -1 cost (hinge)."""
    return (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()) / 2


def generator_loss(fake_scores: Tensor) -> Tensor:
    """What the in-painter minimizes: minus the mean score of its images."""
    return -fake_scores.mean()
