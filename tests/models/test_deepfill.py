from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models.deepfill import (
    DeepFill,
    GatedConv,
    attend,
    contextual_attention,
    fuse,
    known_patches,
    match,
    paste,
)


@pytest.fixture(autouse=True)
def fixed_weights_and_images() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def masked_batch(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Random images with 16 of 64 squares missing, other squares in each."""
    cells = torch.stack([torch.randperm(64) < 16 for _ in range(count)]).float().view(count, 1, 8, 8)
    mask = cells.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    return torch.rand(count, 3, side, side) * (1 - mask) + 0.5 * mask, mask


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The network


def test_the_published_width_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = DeepFill(width=48)

    assert parameter_count(network.coarse) == 1_631_151
    assert parameter_count(network.fine) == 2_421_327
    assert parameter_count(network) == 4_052_478


def convolutions(module: nn.Module) -> list[tuple[int, int, int, int]]:
    """(channels after gating, kernel size, stride, dilation) of each gated convolution, in order."""
    convs = [gated.conv for gated in module.modules() if isinstance(gated, GatedConv)]
    return [(conv.out_channels // 2, conv.kernel_size[0], conv.stride[0], conv.dilation[0]) for conv in convs]


def test_the_layers_are_those_of_the_published_table() -> None:
    with torch.device("meta"):
        network = DeepFill(width=48)
    dilated = [(96, 3, 1, 2), (96, 3, 1, 4), (96, 3, 1, 8), (96, 3, 1, 16)]
    up = [(48, 3, 1, 1), (48, 3, 1, 1), (24, 3, 1, 1), (12, 3, 1, 1)]
    bottleneck = [(96, 3, 1, 1)]

    assert convolutions(network.coarse) == [
        (24, 5, 1, 1),
        *[(48, 3, 2, 1), (48, 3, 1, 1), (96, 3, 2, 1), (96, 3, 1, 1)],
        *[*bottleneck, *dilated, *bottleneck, *bottleneck],
        *up,
    ]
    assert convolutions(network.fine.conv_branch) == [
        (24, 5, 1, 1),
        *[(24, 3, 2, 1), (48, 3, 1, 1), (48, 3, 2, 1), (96, 3, 1, 1)],
        *[*bottleneck, *dilated],
    ]
    assert convolutions(network.fine.before_attention) == [
        (24, 5, 1, 1),
        *[(24, 3, 2, 1), (48, 3, 1, 1), (96, 3, 2, 1), (96, 3, 1, 1)],
        *bottleneck,
    ]
    assert convolutions(network.fine.after_attention) == bottleneck * 2
    assert convolutions(network.fine.join) == bottleneck * 2
    assert convolutions(network.fine.decode) == up
    assert {layer.mode for layer in network.modules() if isinstance(layer, nn.Upsample)} == {"nearest"}


def test_a_gated_convolution_is_elu_of_one_half_times_sigmoid_of_the_other() -> None:
    layer = GatedConv(1, 2)
    layer.conv.weight = nn.Parameter(torch.zeros(4, 1, 3, 3))
    layer.conv.bias = nn.Parameter(torch.tensor([-1.0, 2.0, 0.5, -3.0]))

    gated = layer(torch.rand(1, 1, 4, 4))

    first = (math.exp(-1) - 1) / (1 + math.exp(-0.5))
    second = 2 / (1 + math.exp(3))
    expected = torch.tensor([first, second]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    torch.testing.assert_close(gated, expected)


@pytest.mark.parametrize(
    ("layer", "side"),
    [(GatedConv(1, 1, 5), 8), (GatedConv(1, 1, dilation=4), 8), (GatedConv(1, 1, stride=2), 4)],
)
def test_a_gated_convolution_keeps_the_size_up_to_its_stride(layer: GatedConv, side: int) -> None:
    assert layer(torch.rand(2, 1, 8, 8)).shape == (2, 1, side, side)


def test_only_the_entry_of_the_attention_branch_uses_relu() -> None:
    fine = DeepFill(width=8).fine
    images = torch.rand(1, 3, 32, 32) * 2 - 1

    assert fine.before_attention(images).min() >= 0
    assert fine.before_attention[:-1](images).min() < 0
    assert fine.conv_branch(images).min() < 0


def test_gated_weights_start_kaiming_uniform_by_fan_out_and_every_bias_at_zero() -> None:
    network = DeepFill(width=16)

    for module in network.modules():
        if isinstance(module, GatedConv):
            fan_out = module.conv.out_channels * module.conv.kernel_size[0] ** 2
            bound = math.sqrt(6 / fan_out)
            assert 0.95 * bound < module.conv.weight.abs().max() <= bound
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            assert not module.bias.any()


def test_the_coarse_stage_sees_colors_around_zero_then_ones_then_the_mask() -> None:
    network = DeepFill(width=4)
    seen = list[Tensor]()
    network.coarse.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, mask = masked_batch(2, 32)

    network(images, mask)

    torch.testing.assert_close(seen[0][:, :3], 2 * images - 1)
    assert (seen[0][:, :3][mask.expand(-1, 3, -1, -1) == 1] == 0).all()
    assert (seen[0][:, 3] == 1).all()
    assert torch.equal(seen[0][:, 4:], mask)


def test_the_fine_stage_sees_the_coarse_result_where_pixels_are_missing_and_the_image_elsewhere() -> None:
    network = DeepFill(width=4)
    seen = list[Tensor]()
    network.fine.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    images, mask = masked_batch(2, 32)

    coarse, _ = network(images, mask)

    torch.testing.assert_close((seen[0] + 1) / 2, torch.where(mask == 1, coarse, images))
    assert torch.equal(seen[1], mask)


def test_both_results_fill_the_range_from_0_to_1_and_never_leave_it() -> None:
    network = DeepFill(width=8)
    for convolution in network.modules():
        if isinstance(convolution, nn.Conv2d) and convolution.out_channels == 3:
            nn.init.normal_(convolution.weight, std=1e8)  # a fresh network's features are tiny

    for result in network(*masked_batch(2, 32)):
        assert result.shape == (2, 3, 32, 32)
        assert result.min() == 0
        assert result.max() == 1


@pytest.mark.parametrize("side", [8, 24, 32, 64])
def test_any_multiple_of_8_is_a_size(side: int) -> None:
    results = DeepFill(width=4)(torch.rand(1, 3, side, side), torch.zeros(1, 1, side, side))

    assert [result.shape for result in results] == [(1, 3, side, side)] * 2


@pytest.mark.parametrize(("height", "width"), [(20, 20), (16, 24)])
def test_other_sizes_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"not {height} x {width}"):
        DeepFill(width=4)(torch.rand(1, 3, height, width), torch.zeros(1, 1, height, width))


@pytest.mark.parametrize("width", [0, 6, -4])
def test_a_width_that_cannot_be_quartered_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, not {width}"):
        DeepFill(width)


def strengthen(network: DeepFill) -> None:
    """Let differences through: a fresh network of this depth answers grey, whatever it sees."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)


def test_the_result_of_an_image_is_the_same_alone_and_among_others() -> None:
    network = DeepFill(width=8)
    strengthen(network)
    images, mask = masked_batch(4, 64)

    together = network(images, mask)

    assert together[1].std() > 0.02
    for i in range(len(images)):
        alone = network(images[i : i + 1], mask[i : i + 1])
        for stage_alone, stage_together in zip(alone, together, strict=True):
            torch.testing.assert_close(stage_alone[0], stage_together[i], rtol=0, atol=1e-5)


def test_the_first_images_mask_does_not_matter_to_the_second() -> None:
    network = DeepFill(width=8)
    strengthen(network)
    images, mask = masked_batch(3, 64)
    others, other_mask = images.clone(), mask.clone()
    others[0], other_mask[0] = images[2], mask[2]

    _, fine = network(images, mask)
    _, fine_beside_others = network(others, other_mask)

    torch.testing.assert_close(fine[1], fine_beside_others[1], rtol=0, atol=1e-5)
    assert (fine[0] - fine_beside_others[0]).abs().max() > 0.1


@pytest.mark.parametrize("branch", ["imagined", "copied"])
def test_gradients_reach_the_image_through_each_branch_of_the_fine_stage(branch: str) -> None:
    fine = DeepFill(width=8).fine
    unused = slice(16, 32) if branch == "imagined" else slice(0, 16)
    with torch.no_grad():
        next(fine.join.parameters())[:, unused] = 0
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()

    (gradient,) = torch.autograd.grad(fine(images, masked_batch(2, 64)[1]).square().sum(), images)

    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    silenced = fine.before_attention if branch == "imagined" else fine.conv_branch
    assert all(not _gradient_of(fine, parameter).any() for parameter in silenced.parameters())


def _gradient_of(fine: nn.Module, parameter: nn.Parameter) -> Tensor:
    images, mask = masked_batch(1, 32)
    return torch.autograd.grad(fine(images, mask).sum(), parameter)[0]


def test_the_coarse_result_is_learned_from_the_fine_one() -> None:
    network = DeepFill(width=8)
    images, mask = masked_batch(1, 32)

    network(images, mask)[1].sum().backward()

    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.coarse.parameters())


def test_it_runs_in_bfloat16_autocast() -> None:
    network = DeepFill(width=8)
    images, mask = masked_batch(1, 64)

    exact = network(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = network(images, mask)

    for stage_exact, stage_rounded in zip(exact, rounded, strict=True):
        torch.testing.assert_close(stage_rounded.float(), stage_exact, rtol=0, atol=0.02)


# Contextual attention


def test_a_patch_matches_by_its_inner_product_with_the_other_patchs_direction() -> None:
    features = torch.zeros(1, 1, 2, 2)
    features[0, 0, 0] = torch.tensor([3.0, 4.0])  # with zero padding, every 3x3 patch holds both: norm 5

    scores = match(features)

    # Cell by cell, where 3 and 4 lie in the patches of (0, 0), (0, 1), (1, 0), (1, 1): only patches that see
    # them in the same places have an inner product of 9 + 16; neighbors in a row overlap in one value.
    expected = torch.tensor([[25.0, 12, 0, 0], [12, 25, 0, 0], [0, 0, 25, 12], [0, 0, 12, 25]]) / 5
    torch.testing.assert_close(scores[0], expected)


def test_patches_of_zeros_match_nothing_and_have_finite_gradients() -> None:
    features = torch.zeros(1, 2, 8, 8, requires_grad=True)

    rebuilt = contextual_attention(features, torch.zeros(1, 1, 32, 32))
    (gradient,) = torch.autograd.grad(rebuilt.sum(), features)

    assert not rebuilt.any()
    assert gradient.isfinite().all()


def test_fusing_sums_matches_that_continue_along_the_rows_and_the_columns() -> None:
    scores = torch.zeros(1, 16, 16)
    scores[0, 5, 6] = 1.0  # background cell (1, 1) matches foreground cell (1, 2) of a 4x4 grid

    fused = fuse(scores)

    expected = torch.zeros(16, 16)
    for row in (-4, 0, 4):
        for column in (-1, 0, 1):
            expected[5 + row + column, 6 + row + column] = 1.0
    assert torch.equal(fused[0], expected)


def test_a_patch_is_known_if_all_its_cells_are() -> None:
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :8, :8] = 1  # the upper left of 4x4 cells
    mask[1, :, 16:24, 16:24] = 1  # cell (2, 2)

    known = known_patches(mask).view(2, 4, 4)

    assert torch.equal(known[0], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))
    assert torch.equal(known[1], torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]))


def test_missing_patches_count_as_score_zero_in_the_softmax_and_are_never_copied() -> None:
    scores = torch.tensor([[math.log(2) / 10], [7.0], [math.log(5) / 10]]).unsqueeze(0)
    known = torch.tensor([[1.0, 0.0, 1.0]])

    attention = attend(scores, known)

    torch.testing.assert_close(attention[0, :, 0], torch.tensor([2.0, 0.0, 5.0]) / 8)


def test_where_nothing_is_known_nothing_is_pasted() -> None:
    rebuilt = contextual_attention(torch.rand(1, 2, 8, 8), torch.ones(1, 1, 32, 32))

    assert not rebuilt.any()


def test_each_image_is_judged_by_its_own_mask() -> None:
    features = torch.rand(1, 2, 8, 8).expand(2, -1, -1, -1)
    mask = torch.stack([torch.ones(1, 32, 32), torch.zeros(1, 32, 32)])

    rebuilt = contextual_attention(features, mask)

    assert not rebuilt[0].any()
    assert rebuilt[1].abs().sum() > 1


def test_pasting_every_patch_on_itself_gives_the_same_features_inside() -> None:
    features = torch.rand(1, 2, 8, 8)

    pasted = paste(features, torch.eye(16).unsqueeze(0))

    torch.testing.assert_close(pasted[..., 1:-1, 1:-1], features[..., 1:-1, 1:-1])
    torch.testing.assert_close(pasted[..., 0, 1:-1], features[..., 0, 1:-1] / 2)  # under two patches only


def test_a_missing_region_is_rebuilt_from_the_one_known_region_that_matches_it() -> None:
    # 128 pixels: a 32x32 map, matched on 16x16 cells. The copy shares with its source only the positions that
    # are matched (even rows and columns): what is found at the others can have come from the source alone.
    features = torch.randn(1, 8, 32, 32)
    source = features[..., 4:14, 4:14].clone()
    features[..., 18:28, 16:26] = 0
    features[..., 18:28:2, 16:26:2] = source[..., ::2, ::2]
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 80:104, 72:96] = 1  # cells (10 to 12, 9 to 11)

    rebuilt = contextual_attention(features, mask)

    torch.testing.assert_close(rebuilt[..., 20:26, 18:24], source[..., 2:8, 2:8], rtol=0, atol=1e-3)


def test_contextual_attention_is_its_definition_cell_by_cell() -> None:
    features = torch.randn(1, 2, 8, 8, dtype=torch.float64) / 20  # small, so that every patch has a share
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    mask[..., 8:16, 24:32] = 1

    rebuilt = contextual_attention(features, mask)

    expected = attention_by_definition(features[0], mask[0, 0])
    assert expected.std() > 1e-3
    torch.testing.assert_close(rebuilt[0], expected)


def attention_by_definition(features: Tensor, mask: Tensor) -> Tensor:
    """One image, one patch at a time. Features (C, 2S, 2S) and mask (8S, 8S) of a grid of S x S cells."""
    side = features.shape[1] // 2
    cells = [(row, column) for row in range(side) for column in range(side)]
    by_column = sorted(cells, key=lambda cell: cell[::-1])
    coarse = nn.functional.pad(features[:, ::2, ::2], (1, 1, 1, 1))
    missing = nn.functional.pad(mask[::8, ::8], (1, 1, 1, 1))
    patches = {(r, c): coarse[:, r : r + 3, c : c + 3] for r, c in cells}
    known = {(r, c): not missing[r : r + 3, c : c + 3].any() for r, c in cells}

    scores = {(b, f): float((patches[b] * patches[f]).sum() / patches[b].norm()) for b in cells for f in cells}
    for order in (cells, by_column):
        scores = {
            (b, f): sum(
                scores[order[i + shift], order[j + shift]]
                for shift in (-1, 0, 1)
                if 0 <= i + shift < len(order) and 0 <= j + shift < len(order)
            )
            for i, b in enumerate(order)
            for j, f in enumerate(order)
        }

    raw = nn.functional.pad(features, (1, 1, 1, 1))
    canvas = torch.zeros_like(raw)
    for f in cells:
        weights = {b: math.exp(10 * scores[b, f] * known[b]) for b in cells}
        mixture = sum(weights[b] * known[b] * raw[:, 2 * b[0] :, 2 * b[1] :][:, :4, :4] for b in cells)
        canvas[:, 2 * f[0] :, 2 * f[1] :][:, :4, :4] += mixture / sum(weights.values())
    return canvas[:, 1:-1, 1:-1] / 4


def test_the_gradient_of_contextual_attention_is_exact() -> None:
    features = (torch.randn(2, 2, 8, 8, dtype=torch.float64) / 20).requires_grad_()
    mask = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    mask[0, :, :8, :8] = 1

    assert torch.autograd.gradcheck(lambda f: contextual_attention(f, mask), (features,), fast_mode=True)
