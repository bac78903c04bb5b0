"""The masked autoencoder (He et al., 2022) as AToP's in-painter: the "AE" of its Table 5, after Wu et al. (2023).

A vision transformer reads the patches that are visible, and only those; a second one fills in the others. AToP
does not say how Wu et al.'s network, whose decoder predicts patches normalized one by one, gives it an image. Ours
predicts the pixels themselves, of visible patches as well as hidden ones, so that its output is the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.manifest import MaeSpec

NORM_EPS = 1e-6  # of the published network; torch's own default is 1e-5


class MaskedAutoencoder(nn.Module):
    """Masked images and mask in, restored images out; its positions are fixed, so that one network fits any size.

    `spec.width` 768, 12 blocks and heads, and a decoder of 512, 8 and 16 are the published ViT-B.
    """

    def __init__(self, spec: MaeSpec) -> None:
        super().__init__()
        pixels = 3 * spec.patch_size**2
        self.patch_size = spec.patch_size
        self.embed = nn.Linear(pixels, spec.width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, spec.width))
        self.encoder = _transformer(spec.width, spec.depth, spec.heads)
        self.to_decoder = nn.Linear(spec.width, spec.decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, spec.decoder_width))
        self.decoder = _transformer(spec.decoder_width, spec.decoder_depth, spec.decoder_heads)
        self.predict = nn.Linear(spec.decoder_width, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, masked_images: Tensor, mask: Tensor) -> tuple[Tensor]:
        """Restored images (N, 3, H, W) on the [0, 1] scale, not clamped, from hidden ones and a mask (N, 1, H, W).

        A patch is hidden if any of its pixels is missing; nothing of it is read. Raises ValueError unless H and W
        are whole numbers of patches, and every image hides equally many: then what is visible of each image is as
        long, and a batch needs neither padding nor masked attention. The transforms hide equally many cells.
        """
        height, width = masked_images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"this network needs whole patches of {self.patch_size} pixels, not {height} x {width}")
        patches = F.pixel_unshuffle(2 * masked_images - 1, self.patch_size)
        hidden = hidden_patches(mask.expand(len(masked_images), -1, -1, -1), self.patch_size)
        grid = patches.shape[-2:]
        predicted = self.decode(*self.encode(patches.flatten(2).mT, hidden, grid), grid)
        return ((F.pixel_shuffle(predicted.mT.unflatten(2, grid), self.patch_size) + 1) / 2,)

    def encode(self, patches: Tensor, hidden: Tensor, grid: torch.Size) -> tuple[Tensor, Tensor]:
        """Read the visible ones of L patches (N, L, 3 * patch_size**2), hidden (N, L) being true of the others.

        Returns a class token and V visible ones, (N, 1 + V, width), and which patches these are, followed by those
        that are hidden, (N, L).
        """
        counts = hidden.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"every image must hide as many patches as the others, not {min(counts)} to {max(counts)}")
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        tokens = self.embed(patches) + sine_cosine_positions(grid, self.embed.out_features, patches.device)
        visible = take(tokens, order[:, : order.shape[1] - counts[0]])
        class_token = self.class_token.expand(len(visible), -1, -1)
        return self.encoder(torch.cat([class_token, visible], dim=1)), order

    def decode(self, encoded: Tensor, order: Tensor, grid: torch.Size) -> Tensor:
        """Predict all patches (N, L, 3 * patch_size**2), on the [-1, 1] scale, from what `encode` returns."""
        tokens = self.to_decoder(encoded)
        class_token, visible = tokens[:, :1], tokens[:, 1:]
        missing = self.mask_token.expand(len(visible), order.shape[1] - visible.shape[1], -1)
        in_place = take(torch.cat([visible, missing], dim=1), order.argsort(dim=1))
        in_place = in_place + sine_cosine_positions(grid, in_place.shape[2], in_place.device)
        predicted: Tensor = self.predict(self.decoder(torch.cat([class_token, in_place], dim=1))[:, 1:])
        return predicted


class Block(nn.Module):
    """One block of a transformer, normalized before each part: tokens (N, T, width) to tokens of the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.to_heads, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attend(self.norm1(tokens))
        result: Tensor = tokens + self.perceptron(self.norm2(tokens))
        return result

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention of all tokens to all, in `heads` parts."""
        parts = self.to_heads(tokens).unflatten(2, (3, self.heads, -1))  # (N, T, 3, heads, width / heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        attended: Tensor = self.from_heads(mixed.transpose(1, 2).flatten(2))
        return attended


def _transformer(width: int, depth: int, heads: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width, NORM_EPS))


def hidden_patches(mask: Tensor, patch_size: int) -> Tensor:
    """Which patches miss a pixel, bool (N, L) row by row, by mask (N, 1, H, W), 1 = missing."""
    return F.max_pool2d(mask, patch_size).flatten(1) > 0


def take(tokens: Tensor, order: Tensor) -> Tensor:
    """Each image's own selection of tokens: (N, L, C) and int64 (N, K) to (N, K, C)."""
    return tokens.gather(1, order.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def sine_cosine_positions(grid: torch.Size, width: int, device: torch.device) -> Tensor:
    """What says where each patch of a grid (rows, columns) is, (rows * columns, width); `width` is a multiple of 4.

    As in MAE's code: half of the channels are of the column and half of the row; in both, sines then cosines of
    the number divided by 10000**(i / (width / 4)).
    """
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    frequencies = 10_000 ** -(torch.arange(width // 4, device=device) / (width // 4))

    def waves(numbers: Tensor) -> Tensor:
        angles = numbers.unsqueeze(1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_row, by_column = waves(rows).unsqueeze(1), waves(columns).unsqueeze(0)
    return torch.cat(torch.broadcast_tensors(by_column, by_row), dim=2).flatten(0, 1)
