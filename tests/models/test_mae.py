from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.atop import AtopPurifier
from models.mae import Block, MaskedAutoencoder, hidden_patches, sine_cosine_positions
from models.manifest import AtopPreset, MaeSpec
from models.packed import packed_twin
from models.transforms import hide

SIDE, PATCH = 16, 2


@pytest.fixture(autouse=True)
def fixed_weights_and_images() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def spec(**changes: int) -> MaeSpec:
    tiny = {"patch_size": PATCH, "width": 16, "depth": 2, "heads": 2}
    decoder = {"decoder_width": 12, "decoder_depth": 1, "decoder_heads": 3}
    return MaeSpec.model_validate({"architecture": "mae", **tiny, **decoder, **changes})


def tiny_mae(**changes: int) -> MaskedAutoencoder:
    """A small one, its biases random too."""
    net = MaskedAutoencoder(spec(**changes))
    for parameter in net.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return net


def masks(count: int, hidden: int = 16) -> Tensor:
    """Masks that hide `hidden` of 8x8 cells, other ones in each."""
    cells = torch.stack([torch.randperm(64) < hidden for _ in range(count)]).float().view(count, 1, 8, 8)
    side = SIDE // 8
    return cells.repeat_interleave(side, 2).repeat_interleave(side, 3)


def restore(net: MaskedAutoencoder, images: Tensor, mask: Tensor) -> Tensor:
    (restored,) = net(images, mask)
    assert isinstance(restored, Tensor)
    return restored


# The network


def test_the_published_sizes_have_the_published_number_of_parameters() -> None:
    published = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12}
    decoder = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
    with torch.device("meta"):
        network = MaskedAutoencoder(spec(**published, **decoder))

    positions = 197 * (768 + 512)  # the published count has the two fixed tables, of 14 x 14 patches and a class token
    assert sum(parameter.numel() for parameter in network.parameters()) == 111_907_840 - positions


def one_by_one(net: MaskedAutoencoder, image: Tensor, mask: Tensor) -> Tensor:
    """The restored image (3, H, W), patch by patch: what the network says, without a batch or an index tensor."""
    size = net.patch_size
    corners = [(row, column) for row in range(0, mask.shape[1], size) for column in range(0, mask.shape[2], size)]
    grid = torch.Size([mask.shape[1] // size, mask.shape[2] // size])
    positions, places = sine_cosine_positions(grid, 16, image.device), list[int]()
    tokens = [net.class_token[0, 0]]
    for index, (row, column) in enumerate(corners):
        if not mask[0, row : row + size, column : column + size].any():
            pixels = 2 * image[:, row : row + size, column : column + size].flatten() - 1
            tokens.append(net.embed(pixels) + positions[index])
            places.append(index)
    class_token, *visible = net.to_decoder(net.encoder(torch.stack(tokens)[None]))[0]
    filled = [net.mask_token[0, 0]] * len(corners)
    for place, token in zip(places, visible, strict=True):
        filled[place] = token
    positions = sine_cosine_positions(grid, 12, image.device)
    decoded = net.decoder(torch.stack([class_token, *(torch.stack(filled) + positions)])[None])[0, 1:]
    restored = torch.empty_like(image)
    for (row, column), pixels in zip(corners, net.predict(decoded), strict=True):
        restored[:, row : row + size, column : column + size] = (pixels.view(3, size, size) + 1) / 2
    return restored


@pytest.mark.parametrize(("size", "side"), [(1, 8), (2, 16), (4, 32)])
def test_it_does_patch_by_patch_what_an_autoencoder_does(size: int, side: int) -> None:
    net, images, mask = tiny_mae(patch_size=size), torch.rand(3, 3, side, side), masks(3)
    mask = F.interpolate(mask, size=(side, side), mode="nearest")

    restored = restore(net, images, mask)

    assert restored.shape == images.shape
    for image, own_mask, own in zip(images, mask, restored, strict=True):
        torch.testing.assert_close(own, one_by_one(net, image, own_mask), rtol=1e-4, atol=1e-5)


def test_images_need_not_be_square() -> None:
    net, images, mask = tiny_mae(), torch.rand(1, 3, 8, 12), torch.zeros(1, 1, 8, 12)
    mask[..., 2:4, 6:10] = 1

    torch.testing.assert_close(restore(net, images, mask)[0], one_by_one(net, images[0], mask[0]), rtol=1e-4, atol=1e-5)


def test_positions_are_waves_of_the_column_then_of_the_row() -> None:
    positions = sine_cosine_positions(torch.Size([3, 5]), 8, torch.device("cpu"))

    assert positions.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            waves = [[number, number / 100] for number in (column, row)]  # 10000 ** (1 / 2) is 100
            expected = [wave(angle) for angles in waves for wave in (math.sin, math.cos) for angle in angles]
            assert positions[5 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_attention_is_the_softmax_of_scaled_products_in_each_head() -> None:
    block, tokens = Block(width=8, heads=2), torch.rand(3, 5, 8)

    attended = block.attend(tokens)

    queries, keys, values = block.to_heads(tokens).chunk(3, dim=2)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (queries[..., part] @ keys[..., part].mT / 4**0.5).softmax(2)
        heads.append(weights @ values[..., part])
    torch.testing.assert_close(attended, block.from_heads(torch.cat(heads, dim=2)))


def test_every_block_attends_by_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    fused = F.scaled_dot_product_attention

    def count(queries: Tensor, *others: Any) -> Tensor:
        seen.append(queries.shape[2])
        return fused(queries, *others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    restore(tiny_mae(), torch.rand(2, 3, SIDE, SIDE), masks(2))

    assert seen == [1 + 48, 1 + 48, 1 + 64]  # a class token; two blocks that read what is visible, one that fills


def test_a_block_is_torch_s_transformer_layer_normalized_first() -> None:
    block = Block(width=8, heads=2)
    layer = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {"to_heads.": "self_attn.in_proj_", "from_heads.": "self_attn.out_proj."}
    names |= {"perceptron.0.": "linear1.", "perceptron.2.": "linear2."}
    with torch.no_grad():
        for name, value in block.state_dict().items():
            prefix = next((ours for ours in names if name.startswith(ours)), "")
            layer.get_parameter(name.replace(prefix, names[prefix]) if prefix else name).copy_(value)

    for scale in (1.0, 1e-3):  # where tokens are small, it counts what is added to their variance
        tokens = scale * torch.rand(3, 5, 8)
        torch.testing.assert_close(block(tokens), layer(tokens))


# Masks


def test_what_is_hidden_has_no_influence() -> None:
    net, images, mask = tiny_mae(), torch.rand(3, 3, SIDE, SIDE), masks(3)
    restored = restore(net, hide(images, mask), mask)

    assert torch.equal(restore(net, torch.where(mask == 1, torch.nan, images), mask), restored)
    assert not torch.allclose(restore(net, hide(images.roll(1, 3), mask), mask), restored, atol=1e-3)


def test_a_patch_is_hidden_if_one_of_its_pixels_is_missing() -> None:
    net, images, mask = tiny_mae(), torch.rand(2, 3, SIDE, SIDE), torch.zeros(2, 1, SIDE, SIDE)
    mask[0, 0, 5, 8] = 1
    mask[1, 0, 14, 3] = 1
    whole = mask.clone()
    whole[0, 0, 4:6, 8:10] = 1
    whole[1, 0, 14:16, 2:4] = 1

    assert hidden_patches(mask, PATCH).nonzero().tolist() == [[0, 2 * 8 + 4], [1, 7 * 8 + 1]]
    assert torch.equal(restore(net, images, mask), restore(net, images, whole))
    assert not torch.allclose(restore(net, images, mask), restore(net, images, mask.flip(0)), atol=1e-3)


def test_an_image_depends_on_neither_pixels_nor_masks_of_its_neighbors() -> None:
    net, images, mask = tiny_mae().train(), torch.rand(4, 3, SIDE, SIDE), masks(4)
    restored = restore(net, images, mask)
    others, other_mask = torch.rand_like(images), masks(4)
    others[2], other_mask[2] = images[2], mask[2]

    assert torch.equal(restore(net, others, other_mask)[2], restored[2])
    torch.testing.assert_close(restore(net, images[2:3], mask[2:3])[0], restored[2])
    assert not torch.allclose(restore(net, images, other_mask)[1], restored[1], atol=1e-3)


def test_one_mask_for_all_images_is_as_good_as_one_each() -> None:
    net, images, mask = tiny_mae(), torch.rand(3, 3, SIDE, SIDE), masks(1)

    assert torch.equal(restore(net, images, mask), restore(net, images, mask.expand(3, -1, -1, -1)))


def test_all_may_be_visible_and_nothing() -> None:
    net, images = tiny_mae(), torch.rand(2, 3, SIDE, SIDE)
    nothing, everything = masks(2, hidden=0), masks(2, hidden=64)

    seen = restore(net, images, nothing)
    guessed = restore(net, images, everything)

    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert torch.equal(guessed[0], guessed[1])
    torch.testing.assert_close(guessed[0], one_by_one(net, images[0], everything[0]), rtol=1e-4, atol=1e-5)


def test_images_that_hide_unequal_shares_and_parts_of_patches_are_refused() -> None:
    net = tiny_mae()
    uneven = torch.cat([masks(1, hidden=16), masks(1, hidden=12)])
    with pytest.raises(ValueError, match="not 12 to 16"):
        net(torch.rand(2, 3, SIDE, SIDE), uneven)
    with pytest.raises(ValueError, match="whole patches of 2 pixels, not 16 x 15"):
        net(torch.rand(1, 3, 16, 15), torch.zeros(1, 1, 16, 15))


# Gradients


def test_every_parameter_learns_and_gradients_reach_what_is_visible_alone() -> None:
    net, mask = tiny_mae(), masks(2)
    images = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)

    restore(net, images, mask).square().sum().backward()

    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())
    assert images.grad is not None
    reached = (images.grad != 0).all(dim=1, keepdim=True)
    assert torch.equal(reached, mask == 0)


def test_gradients_are_those_of_finite_differences() -> None:
    net, mask = tiny_mae().double(), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2, 2:] = 1
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def of_the_mask_token(token: Tensor) -> Tensor:
        (restored,) = torch.func.functional_call(net, {"mask_token": token}, (image.detach(), mask))
        assert isinstance(restored, Tensor)
        return restored

    assert torch.autograd.gradcheck(lambda pixels: restore(net, pixels, mask), image)
    assert torch.autograd.gradcheck(of_the_mask_token, net.mask_token)


def test_bfloat16_autocast_is_near_float32() -> None:
    net, images, mask = tiny_mae(), torch.rand(2, 3, SIDE, SIDE), masks(2)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = restore(net, images, mask)

    torch.testing.assert_close(coarse.float(), restore(net, images, mask), rtol=0.05, atol=0.05)


# As a purifier


@pytest.mark.parametrize(
    ("transform", "ratio"), [("rt1", 0.25), ("rt1", 0.0), ("rt2", 0.25), ("rt2", 0.0), ("rt3", 0.25)]
)
def test_it_purifies_by_every_transform_whoever_the_neighbors_are(transform: str, ratio: float) -> None:
    sigma = 0 if transform == "rt1" else 0.1
    fields = {"transform": transform, "working_size": SIDE, "sigma": sigma, "mask_ratio": ratio}
    net = tiny_mae().eval().requires_grad_(False)
    purifier = AtopPurifier(packed_twin(net), AtopPreset.model_validate(fields))
    images = torch.rand(8, 3, 8, 8)

    purified = purifier(images, list(range(8)))

    assert purified.shape == images.shape
    assert bool(((purified >= 0) & (purified <= 1)).all())
    torch.testing.assert_close(purifier(images[5:6], [5]), purified[5:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(AtopPurifier(net, purifier.preset)(images, list(range(8))), purified)
    if sigma or ratio:
        assert not torch.allclose(purifier(images[5:6], [6]), purified[5:6], atol=1e-3)
