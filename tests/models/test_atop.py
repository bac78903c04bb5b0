from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import transforms
from models.atop import AtopPurifier, build_inpainter
from models.deepfill import DeepFill
from models.mae import MaskedAutoencoder
from models.manifest import AtopPreset, InpainterSpec, MaeSpec
from models.unet import UNet


class Paint(nn.Module):
    """Fills what is missing with one color and leaves the rest; records what it was shown."""

    def __init__(self, color: float) -> None:
        super().__init__()
        self.color = color
        self.shown = list[tuple[Tensor, Tensor]]()

    def forward(self, masked_images: Tensor, mask: Tensor) -> tuple[Tensor]:
        self.shown.append((masked_images, mask))
        return (masked_images * (1 - mask) + self.color * mask,)


def preset(transform: str, *, sigma: float = 0.1, working_size: int = 32) -> AtopPreset:
    return AtopPreset.model_validate({"transform": transform, "working_size": working_size, "sigma": sigma})


def test_specs_build_their_networks() -> None:
    assert isinstance(build_inpainter(InpainterSpec(architecture="unet", width=4)), UNet)
    assert isinstance(build_inpainter(InpainterSpec(architecture="deepfill", width=8)), DeepFill)
    encoder = {"patch_size": 2, "width": 8, "depth": 3, "heads": 2}
    decoder = {"decoder_width": 4, "decoder_depth": 1, "decoder_heads": 1}
    autoencoder = build_inpainter(MaeSpec.model_validate({"architecture": "mae", **encoder, **decoder}))
    assert isinstance(autoencoder, MaskedAutoencoder)
    assert (len(autoencoder.encoder), len(autoencoder.decoder)) == (3 + 1, 1 + 1)  # blocks, and a last norm


def test_rt1_hides_a_quarter_of_the_cells_and_adds_no_noise() -> None:
    images, painter = torch.rand(2, 3, 32, 32), Paint(1.0)

    purified = AtopPurifier(painter, preset("rt1", sigma=0))(images, [1, 2])

    ((shown, mask),) = painter.shown
    assert mask.mean(dim=(1, 2, 3)).tolist() == [0.25, 0.25]
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(shown, transforms.hide(images, mask))
    assert torch.equal(purified, images * (1 - mask) + mask)


def test_rt2_adds_the_noise_of_the_image_s_own_seed_before_it_hides() -> None:
    images, painter = torch.full((1, 3, 32, 32), 0.5), Paint(0.5)

    AtopPurifier(painter, preset("rt2", sigma=0.1))(images, [3])

    ((shown, mask),) = painter.shown
    noise = transforms.draw_noise([3], size=32, device=images.device)
    assert torch.equal(shown, transforms.hide(transforms.add_noise(images, noise, 0.1), mask))


def test_rt3_keeps_only_what_was_painted_and_its_passes_share_the_noise() -> None:
    images, painter = torch.full((1, 3, 32, 32), 0.5), Paint(0.75)

    purified = AtopPurifier(painter, preset("rt3"))(images, [3])

    assert len(painter.shown) == 4
    assert torch.equal(purified, torch.full_like(images, 0.75))
    visible = torch.stack([shown * (1 - mask) for shown, mask in painter.shown])
    counts = torch.stack([1 - mask for _, mask in painter.shown]).sum(0)
    average = visible.sum(0) / counts
    for shown, mask in painter.shown:
        assert torch.allclose(shown * (1 - mask), average * (1 - mask))


def test_a_larger_working_image_is_made_and_undone_inside() -> None:
    gradient = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(2, 3, 16, 16).contiguous()
    painter = Paint(0.5)
    purifier = AtopPurifier(painter, preset("rt1", sigma=0, working_size=64))

    purified = purifier(gradient, [1, 1])

    assert painter.shown[0][0].shape == (2, 3, 64, 64)
    assert purified.shape == gradient.shape
    assert torch.allclose(purifier.shrink(purifier.enlarge(gradient), (16, 16)), gradient, atol=0.02)


@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
def test_same_image_and_seed_give_the_same_result_alone_and_among_63_others(transform: str) -> None:
    net = UNet(width=4)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    purifier = AtopPurifier(net, preset(transform, sigma=0 if transform == "rt1" else 0.1))
    images = torch.rand(64, 3, 32, 32)

    batch = purifier(images, list(range(64)))
    alone = purifier(images[40:41], [40])

    assert torch.allclose(batch[40:41], alone, atol=1e-5)
    assert not torch.allclose(purifier(images[40:41], [41]), alone, atol=1e-3)
    assert bool(((batch >= 0) & (batch <= 1)).all())


def test_gradients_reach_the_image_through_what_stays_visible() -> None:
    images, painter = torch.rand(1, 3, 32, 32, requires_grad=True), Paint(0.5)

    AtopPurifier(painter, preset("rt1", sigma=0))(images, [5]).sum().backward()

    mask = painter.shown[0][1]
    assert images.grad is not None
    assert torch.equal(images.grad, (1 - mask).expand_as(images))
