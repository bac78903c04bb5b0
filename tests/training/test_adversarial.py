from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fakes import smooth_classifier
from training.adversarial import (
    AdversarialTraining,
    AvmixupTraining,
    NoisyFgsmTraining,
    PgdTraining,
    TradesTraining,
    attack,
    avmixup,
    farthest,
    running_statistics_kept,
    smoothed,
    training_loss,
)
from training.attacks.threats import Linf, assert_in_budget

EPS = 0.1
METHODS: list[AdversarialTraining] = [
    NoisyFgsmTraining(method="n-fgsm", eps=EPS),
    PgdTraining(method="pgd", eps=EPS, step_size=0.03, steps=5),
    TradesTraining(method="trades", eps=EPS, step_size=0.03, steps=5),
    AvmixupTraining(method="avmixup", eps=EPS, step_size=0.03, steps=5),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 8, 8, generator=generator(9))
    return images, F.one_hot(torch.arange(count) % 3, 3).float()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.method)
def test_training_images_are_in_range_raise_the_loss_and_are_fixed_by_the_generator(
    method: AdversarialTraining,
) -> None:
    classifier, (images, targets) = smooth_classifier(), batch()

    attacked, aims = attack(classifier, images, targets, method, generator())

    assert torch.equal(attacked, attack(classifier, images, targets, method, generator())[0])
    assert torch.equal(attacked, attacked.clamp(0, 1))
    assert F.cross_entropy(classifier(attacked), targets) > F.cross_entropy(classifier(images), targets)
    torch.testing.assert_close(aims.sum(1), torch.ones(6))
    assert all(weight.grad is None for weight in classifier.parameters())


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda method: method.method)
def test_pgd_and_trades_stay_in_the_ball(method: AdversarialTraining) -> None:
    images, targets = batch()
    attacked, aims = attack(smooth_classifier(), images, targets, method, generator())
    assert_in_budget(attacked, images, Linf(EPS), method.method)
    assert torch.equal(aims, targets)


def test_trades_goes_where_the_outputs_diverge_whatever_the_label() -> None:
    classifier, (images, targets) = smooth_classifier(), batch()
    method = METHODS[2]
    assert isinstance(method, TradesTraining)

    attacked = farthest(classifier, images, method, generator())

    def divergence(moved: Tensor) -> Tensor:
        return F.kl_div(classifier(moved).log_softmax(1), classifier(images).softmax(1), reduction="none").sum(1)

    random = Linf(EPS).start(images, generator())
    assert (divergence(attacked) > divergence(random)).all()
    other = attack(classifier, images, targets.roll(1, 1), method, generator())[0]
    assert torch.equal(attacked, other)


def test_the_loss_of_trades_is_clean_cross_entropy_plus_beta_divergences() -> None:
    classifier, (images, targets) = smooth_classifier(), batch()
    attacked = images.flip(0)
    method = TradesTraining(method="trades", beta=3.0)

    loss, logits = training_loss(classifier, images, attacked, targets, method, F.cross_entropy)

    clean, moved = classifier(images).softmax(1), classifier(attacked).softmax(1)
    expected = F.cross_entropy(classifier(images), targets) + 3 * (clean * (clean / moved).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, classifier(attacked))


def test_the_other_methods_minimize_the_loss_of_the_attacked_images() -> None:
    classifier, (images, targets) = smooth_classifier(), batch()
    for method in (None, METHODS[0], METHODS[1], METHODS[3]):
        loss, _ = training_loss(classifier, images, images.flip(0), targets, method, F.cross_entropy)
        torch.testing.assert_close(loss, F.cross_entropy(classifier(images.flip(0)), targets))


def test_avmixup_mixes_image_and_vertex_and_their_targets_by_the_same_share() -> None:
    images, targets = torch.full((400, 3, 2, 2), 0.5), F.one_hot(torch.arange(400) % 4, 4).float()
    method = AvmixupTraining(method="avmixup", gamma=2.0, clean_share=1.0, vertex_share=0.1)

    mixed, aims = avmixup(images, images + 0.1, targets, method, generator())

    shares = 1 - (mixed[:, 0, 0, 0] - 0.5) / 0.2  # the vertex lies at 0.7
    assert 0.45 < shares.mean() < 0.55
    assert shares.min() < 0.05 < 0.95 < shares.max()
    true = (aims * targets).sum(1)
    torch.testing.assert_close(true, shares + (1 - shares) * 0.1)
    torch.testing.assert_close(aims.sum(1), torch.ones(400))


def test_smoothing_keeps_a_share_and_spreads_the_rest() -> None:
    torch.testing.assert_close(smoothed(torch.tensor([[0.0, 1.0, 0.0]]), 0.6), torch.tensor([[0.2, 0.6, 0.2]]))


def test_an_attack_sees_batch_statistics_and_leaves_the_running_ones_alone() -> None:
    norm = nn.BatchNorm2d(3).train()
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    images = batch()[0]
    with running_statistics_kept(norm):
        seen = norm(images)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    assert torch.equal(norm.running_mean, before)
    norm(images)
    assert not torch.equal(norm.running_mean, before)
