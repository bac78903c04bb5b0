from __future__ import annotations

import pytest
import torch
from torch import nn

from models.aid import AidDiscriminator, AidPurifier, pooled_taps, tap_channels
from models.manifest import AidPreset, AidSpec
from tests.networks import SIZE, tiny_aid, tiny_classifier


def parameters(spec: AidSpec, channels: list[int]) -> int:
    return sum(p.numel() for p in AidDiscriminator(spec, channels).parameters())


def test_the_published_layouts_have_the_published_number_of_parameters() -> None:
    taps = ("conv1", "block10")

    assert parameters(AidSpec(taps=taps, layout="code"), [16, 320]) == 9_280_513
    assert parameters(AidSpec(taps=taps, layout="code", tap_layers=1, joint_layers=2), [16, 640]) == 6_979_585
    assert parameters(AidSpec(taps=taps, layout="paper", joint_layers=2), [16, 320]) == 5_068_801


def test_only_the_code_layout_has_batch_norm() -> None:
    def norms(layout: str) -> int:
        spec = AidSpec.model_validate({"taps": ("a", "b"), "layout": layout, "width": 4})
        return sum(isinstance(module, nn.BatchNorm1d) for module in AidDiscriminator(spec, [3, 5]).modules())

    assert norms("code") == 2 * 2 + 3
    assert norms("paper") == 0


def test_taps_are_averaged_over_space() -> None:
    classifier, images = tiny_classifier(), torch.rand(2, 3, SIZE, SIZE)

    stage1, pool = pooled_taps(classifier, images, ["stage1", "pool"])

    assert torch.allclose(stage1, classifier.features(images, ["stage1"])[0].mean((2, 3)), atol=1e-6)
    assert torch.equal(pool, classifier.embedding(images))
    assert tap_channels(classifier, ["stage2", "stage1"], (SIZE, SIZE)) == [8, 6]


def test_the_score_is_the_probability_that_the_logit_states() -> None:
    aid, images = tiny_aid(tiny_classifier()), torch.rand(3, 3, SIZE, SIZE)

    assert torch.allclose(aid(images), aid.logits(images).sigmoid())
    assert aid(images).shape == (3,)


@pytest.mark.parametrize("layout", ["code", "paper"])
def test_purification_ascends_the_score_inside_its_ball(layout: str) -> None:
    aid, images = tiny_aid(tiny_classifier(), layout), torch.rand(8, 3, SIZE, SIZE)
    preset = AidPreset(eps=0.03, step_size=0.005, steps=10)

    purified = AidPurifier(aid, preset)(images, range(8))

    assert bool((aid.logits(purified) > aid.logits(images)).all())
    assert float((purified - images).abs().max()) <= 0.03 + 1e-6
    assert bool(((purified >= 0) & (purified <= 1)).all())


def test_one_step_is_the_sign_of_the_gradient_of_the_logit() -> None:
    aid, images = tiny_aid(tiny_classifier()), 0.25 + 0.5 * torch.rand(1, 3, SIZE, SIZE)
    asked = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(aid.logits(asked).sum(), asked)

    purified = AidPurifier(aid, AidPreset(eps=0.1, step_size=0.01, steps=1))(images, [0])

    assert torch.allclose(purified, images + 0.01 * gradient.sign())


def test_a_saturated_score_still_moves_the_image() -> None:
    aid, images = tiny_aid(tiny_classifier()), torch.rand(1, 3, SIZE, SIZE)
    final = aid.discriminator.joint[-1]
    assert isinstance(final, nn.Linear)
    final.bias.data.fill_(-200)  # the sigmoid and its gradient are exactly 0 in float32

    purified = AidPurifier(aid, AidPreset())(images, [0])

    assert float(aid(images)) == 0
    assert float((purified - images).abs().mean()) > 0.01


def test_an_image_does_not_depend_on_its_neighbors_and_works_without_gradients() -> None:
    purifier, images = AidPurifier(tiny_aid(tiny_classifier()), AidPreset()), torch.rand(6, 3, SIZE, SIZE)

    with torch.no_grad():
        together, alone = purifier(images, range(6)), purifier(images[3:4], [99])

    assert float((together[3:4] - alone).abs().mean()) < 1e-3
    assert not purifier.is_random


def test_the_attacker_s_gradient_is_the_identity() -> None:
    purifier = AidPurifier(tiny_aid(tiny_classifier()), AidPreset(eps=0.03))
    images = (0.25 + 0.5 * torch.rand(1, 3, SIZE, SIZE)).requires_grad_()

    purifier(images, [0]).sum().backward()

    assert images.grad is not None
    assert torch.equal(images.grad, torch.ones_like(images))
    assert all(p.grad is None for p in purifier.parameters())
