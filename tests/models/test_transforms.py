from __future__ import annotations

import pytest
import torch

from models.transforms import add_noise, cell_masks, draw_cell_orders, draw_noise, hide, recombine

CPU = torch.device("cpu")


def orders(count: int, cells: int = 64) -> torch.Tensor:
    return torch.stack([torch.randperm(cells, generator=torch.Generator().manual_seed(i)) for i in range(count)])


def test_hidden_pixels_become_mid_grey_and_the_others_stay() -> None:
    images = torch.rand(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1, 2] = 1

    hidden = hide(images, mask)

    assert hidden[0, :, 1, 2].tolist() == [0.5, 0.5, 0.5]
    assert torch.equal(hidden[1], images[1])
    assert int((hidden != images).sum()) == 3


def test_noise_is_scaled_by_sigma_and_clipped_with_the_image() -> None:
    images = torch.tensor([0.5, 0.95, 0.05]).view(1, 3, 1, 1)
    noise = torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1)

    noisy = add_noise(images, noise, sigma=0.1)

    assert noisy.flatten().tolist() == pytest.approx([0.6, 1.0, 0.0])


@pytest.mark.parametrize("hidden", [16, 6, 0, 64])
def test_the_number_of_hidden_cells_is_exact(hidden: int) -> None:
    (mask,) = cell_masks(orders(5), hidden=hidden, size=32)

    assert mask.shape == (5, 1, 32, 32)
    assert mask.sum(dim=(1, 2, 3)).tolist() == [hidden * 16.0] * 5


def test_masks_hide_whole_square_cells() -> None:
    (mask,) = cell_masks(orders(3), hidden=16, size=32)
    cells = mask.view(3, 8, 4, 8, 4)

    assert torch.equal(cells.amin(dim=(2, 4)), cells.amax(dim=(2, 4)))


def test_the_passes_of_rt3_hide_every_pixel_exactly_once() -> None:
    masks = cell_masks(orders(3), hidden=16, size=64, passes=4)

    assert len(masks) == 4
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(3, 1, 64, 64))


def test_more_passes_than_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="need more than 64 cells"):
        cell_masks(orders(1), hidden=16, size=32, passes=5)


def test_recombination_takes_each_pixel_from_the_pass_that_hid_it() -> None:
    masks = cell_masks(orders(2), hidden=16, size=32, passes=4)
    filled = [torch.full((2, 3, 32, 32), float(index)) for index in range(4)]

    result = recombine(filled, masks)

    for index, mask in enumerate(masks):
        assert (result[mask.expand_as(result) == 1] == index).all()


def test_masks_and_noise_of_an_image_do_not_depend_on_its_neighbors() -> None:
    alone = draw_cell_orders([9], cells=64, device=CPU)
    batch = draw_cell_orders([1, 9, 3], cells=64, device=CPU)

    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(draw_noise([1, 9], size=8, device=CPU)[1], draw_noise([9], size=8, device=CPU)[0])
