from __future__ import annotations

import pytest
import torch

from models.unet import UNet


def randomized(net: UNet) -> UNet:
    """The same network with no weight left at zero, so that every path carries a signal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


@pytest.mark.parametrize(("space_to_depth", "size"), [(1, 32), (2, 64), (4, 64)])
def test_shape_stays_and_a_fresh_network_returns_its_input(space_to_depth: int, size: int) -> None:
    masked, mask = torch.rand(2, 3, size, size), torch.zeros(2, 1, size, size)

    (restored,) = UNet(width=4, space_to_depth=space_to_depth)(masked, mask)

    assert torch.equal(restored, masked)


def test_the_mask_is_seen() -> None:
    net, masked = randomized(UNet(width=4)), torch.rand(1, 3, 16, 16)

    nothing = net(masked, torch.zeros(1, 1, 16, 16))[0]
    everything = net(masked, torch.ones(1, 1, 16, 16))[0]

    assert not torch.allclose(nothing, everything)


def test_an_image_does_not_depend_on_its_neighbors() -> None:
    net, masked, mask = randomized(UNet(width=4)).train(), torch.rand(5, 3, 16, 16), torch.ones(5, 1, 16, 16)

    assert torch.allclose(net(masked, mask)[0][2:3], net(masked[2:3], mask[2:3])[0], atol=1e-6)


def test_every_parameter_learns() -> None:
    net = randomized(UNet(width=4))
    net(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))[0].square().sum().backward()

    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


def test_folding_keeps_the_cost_of_a_large_working_image_near_that_of_a_small_one() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(space_to_depth: int, size: int) -> int:
        with FlopCounterMode(display=False) as counter:
            UNet(width=8, space_to_depth=space_to_depth)(torch.rand(1, 3, size, size), torch.zeros(1, 1, size, size))
        return int(counter.get_total_flops())

    assert flops(4, 128) < 2 * flops(1, 32)
