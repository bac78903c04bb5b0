from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models.patchgan import PatchDiscriminator, discriminator_loss, generator_loss


@pytest.fixture(autouse=True)
def fixed_weights_and_images() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def convolutions(discriminator: PatchDiscriminator) -> list[nn.Conv2d]:
    return [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]


def stored_weight(conv: nn.Conv2d) -> Tensor:
    return conv.get_parameter("parametrizations.weight.original")


def test_the_published_width_has_the_published_number_of_parameters() -> None:
    discriminator = PatchDiscriminator(width=64)

    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 5_946_816


@pytest.mark.parametrize(("side", "places"), [(32, 1), (64, 1), (96, 4), (256, 16)])
def test_every_feature_of_every_place_gets_a_score(side: int, places: int) -> None:
    scores = PatchDiscriminator(width=2)(torch.rand(3, 3, side, side), torch.zeros(3, 1, side, side))

    assert scores.shape == (3, 4 * 2 * places)


def test_it_sees_colors_around_zero_and_the_mask() -> None:
    discriminator = PatchDiscriminator(width=2)
    seen = list[Tensor]()
    discriminator.layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32).round()

    discriminator(images, mask)

    torch.testing.assert_close(seen[0], torch.cat([2 * images - 1, mask], dim=1))


def test_negative_scores_are_those_of_a_leaky_relu() -> None:
    discriminator = PatchDiscriminator(width=2).eval()
    images, mask = torch.rand(4, 3, 32, 32), torch.zeros(4, 1, 32, 32)

    scores = discriminator(images, mask)
    before_the_last = discriminator.layers[:-1](torch.cat([2 * images - 1, mask], dim=1)).flatten(1)

    assert (before_the_last < 0).any()
    torch.testing.assert_close(scores, torch.where(before_the_last < 0, 0.2, 1.0) * before_the_last)


def test_in_use_no_convolution_stretches_by_more_than_one_and_its_stored_weight_stays() -> None:
    discriminator = PatchDiscriminator(width=4)
    with torch.no_grad():
        for conv in convolutions(discriminator):
            stored_weight(conv).mul_(20)
    before = [stored_weight(conv).clone() for conv in convolutions(discriminator)]

    for _ in range(50):
        discriminator(torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))

    discriminator.eval()
    for conv, stored in zip(convolutions(discriminator), before, strict=True):
        assert torch.linalg.svdvals(stored.flatten(1))[0] > 5
        torch.testing.assert_close(
            torch.linalg.svdvals(conv.weight.flatten(1))[0], torch.tensor(1.0), rtol=0, atol=0.02
        )
        assert torch.equal(stored_weight(conv), stored)


def test_evaluation_changes_nothing() -> None:
    discriminator = PatchDiscriminator(width=2).eval()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    images, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)

    assert torch.equal(discriminator(images, mask), discriminator(images, mask))
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())


def test_scores_do_not_depend_on_the_neighbors() -> None:
    discriminator = PatchDiscriminator(width=4).eval()
    images, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 1, 64, 64).round()

    together = discriminator(images, mask)

    assert together.std(dim=0).max() > 1e-3
    for i in range(3):
        torch.testing.assert_close(discriminator(images[i : i + 1], mask[i : i + 1])[0], together[i])


def test_both_losses_are_the_hinge_losses() -> None:
    real = torch.tensor([[2.0, 1.0], [0.0, -1.0]])  # hinge at 1: 0, 0, 1, 2
    fake = torch.tensor([[-3.0, -1.0], [0.0, 2.0]])  # hinge at -1: 0, 0, 1, 3

    assert discriminator_loss(real, fake).item() == pytest.approx((3 / 4 + 4 / 4) / 2)
    assert generator_loss(fake).item() == pytest.approx(2 / 4)


def test_the_generators_loss_has_a_gradient_to_every_image() -> None:
    discriminator = PatchDiscriminator(width=4)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)

    (gradient,) = torch.autograd.grad(generator_loss(discriminator(images, torch.ones(2, 1, 32, 32))), images)

    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_a_few_steps_teach_it_to_tell_stripes_from_grey() -> None:
    discriminator = PatchDiscriminator(width=4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=5e-3, betas=(0.5, 0.999))
    stripes = torch.zeros(4, 3, 32, 32)
    stripes[..., ::2] = 1
    grey, mask = torch.full_like(stripes, 0.5), torch.zeros(4, 1, 32, 32)
    losses = list[float]()

    for _ in range(30):
        loss = discriminator_loss(discriminator(stripes, mask), discriminator(grey, mask))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())

    assert losses[0] > 0.9
    assert losses[-1] < 0.5
