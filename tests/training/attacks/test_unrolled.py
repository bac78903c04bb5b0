from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.aid import AidPurifier
from models.manifest import AidPreset
from models.zeropur import ZeroPurPurifier
from tests.networks import SIZE, tiny_aid, tiny_classifier, zeropur_preset
from training.attacks.pgd import ascend, cross_entropy, loss_gradient, margin
from training.attacks.threats import Linf, assert_in_budget
from training.attacks.unrolled import Descending, iterates, over_iterates, smooth_sign, through_smooth_steps

IMAGES = 0.2 + 0.6 * torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])


def aid_purifier(steps: int = 3) -> AidPurifier:
    return AidPurifier(tiny_aid(tiny_classifier()), AidPreset(eps=0.03, step_size=0.01, steps=steps))


def zeropur(**changes: object) -> ZeroPurPurifier:
    settings: dict[str, object] = {"eps": 0.03, "coarse_steps": 3, "coarse_step_size": 0.01, "fine_steps": 3}
    return ZeroPurPurifier(tiny_classifier(), zeropur_preset(**(settings | {"fine_step_size": 0.01} | changes)))


PURIFIERS = {
    "aid": aid_purifier(),
    "zeropur": zeropur(),
    "zeropur, plain signs": zeropur(momentum=0.0),
    "zeropur, coarse": zeropur(fine_steps=0),
    "zeropur, two coarse layers": zeropur(fine_steps=0, coarse_layers=("stage1", "pool")),
    "zeropur, median": zeropur(blur={"kind": "median", "size": 3}),
}


@pytest.mark.parametrize("purifier", PURIFIERS.values(), ids=PURIFIERS)
def test_with_signs_the_last_iterate_is_what_the_purifier_answers(purifier: Descending) -> None:
    found = iterates(purifier, IMAGES)
    # A sign may turn where a gradient is nearly zero, since the two sum up in another order.
    assert (found[-1] - purifier(IMAGES, range(4))).abs().gt(1e-5).float().mean() < 0.002
    steps = purifier.preset.steps if isinstance(purifier, AidPurifier) else None
    assert len(found) == (steps or purifier.preset.coarse_steps + purifier.preset.fine_steps)  # type: ignore[union-attr]


def test_a_smooth_sign_becomes_the_sign() -> None:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(smooth_sign(1e6)(values), values.sign())
    torch.testing.assert_close(smooth_sign(3.0)(1e-9 * values), smooth_sign(3.0)(1e9 * values))
    assert smooth_sign(3.0)(torch.zeros(1, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("purifier", PURIFIERS.values(), ids=PURIFIERS)
def test_recomputing_steps_gives_the_gradient_of_keeping_them(purifier: Descending) -> None:
    gradients = []
    for checkpointed in (True, False):
        images = IMAGES.clone().requires_grad_()
        purified = iterates(purifier, images, smooth_sign(2.0), checkpointed=checkpointed)[-1]
        F.cross_entropy(tiny_classifier()(purified), LABELS, reduction="sum").backward()
        assert images.grad is not None
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", ["aid", "zeropur", "zeropur, coarse"])
def test_the_smooth_gradient_is_that_of_the_whole_unrolled_purification(name: str) -> None:
    """Against central differences, in double precision."""
    fresh: dict[str, Descending] = {
        "aid": aid_purifier(),
        "zeropur": zeropur(),
        "zeropur, coarse": zeropur(fine_steps=0),
    }
    purifier = fresh[name].double()
    classifier = tiny_classifier().double()
    images = IMAGES.double()
    value, gradient = through_smooth_steps(purifier, classifier, LABELS, sharpness=2.0)(images)

    def loss(images: Tensor) -> Tensor:
        purified = iterates(purifier, images, smooth_sign(2.0), checkpointed=False)[-1].detach()
        return F.cross_entropy(classifier(purified), LABELS, reduction="none")

    torch.testing.assert_close(value, margin(classifier(iterates(purifier, images)[-1]), LABELS), rtol=1e-5, atol=1e-5)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-6
    slopes = (loss(images + h * direction) - loss(images - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slopes, rtol=2e-3, atol=1e-6)


def test_over_iterates_is_the_mean_of_bpda_at_each() -> None:
    purifier, classifier = aid_purifier(), tiny_classifier()
    seen = iterates(purifier, IMAGES)
    value, gradient = over_iterates(purifier, classifier, LABELS)(IMAGES)
    torch.testing.assert_close(gradient, torch.stack([loss_gradient(classifier, x, LABELS) for x in seen]).mean(0))
    torch.testing.assert_close(value, margin(classifier(seen[-1]), LABELS).detach())


@pytest.mark.parametrize("purifier", [aid_purifier(), zeropur()], ids=["aid", "zeropur"])
def test_both_attacks_raise_the_loss_behind_the_real_purifier(purifier: Descending) -> None:
    classifier, threat = tiny_classifier(), Linf(0.05)

    def loss(images: Tensor) -> float:
        return cross_entropy(classifier(purifier(images, range(4))), LABELS).mean().item()

    for objective in (
        over_iterates(purifier, classifier, LABELS),
        through_smooth_steps(purifier, classifier, LABELS, sharpness=3.0),
    ):
        moved = ascend(objective, IMAGES, IMAGES, threat, steps=5, step_size=0.02)
        assert_in_budget(moved, IMAGES, threat, "the attack")
        assert loss(moved) > loss(IMAGES)


@pytest.mark.parametrize(
    "changes", [{"random_start": True}, {"perceptual_weight": 1.0}, {"coarse_steps": 0, "fine_steps": 0}]
)
def test_what_the_copy_does_not_know_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be unrolled"):
        iterates(zeropur(**changes), IMAGES)
