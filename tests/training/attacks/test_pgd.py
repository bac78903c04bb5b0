from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fakes import linear_problem, smooth_classifier, weight_of
from training.attacks.by_foolbox import (
    foolbox_cw,
    foolbox_deepfool,
    foolbox_fgsm,
    foolbox_mim,
    foolbox_pgd,
    foolbox_pgd_l2,
)
from training.attacks.pgd import Model, ascend, classified, loss_gradient, margin, noisy_fgsm, pgd_linf
from training.attacks.threats import Linf


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def one_step(model: Model, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    return noisy_fgsm(model, images, labels, eps=eps, noise=0.0, generator=generator())


def our_pgd(model: Model, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    return pgd_linf(model, images, labels, eps=eps, steps=30, step_size=eps / 10, generator=generator())


def their_pgd(model: torch.nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    return foolbox_pgd(model, images, labels, eps=eps, steps=30, step_size=eps / 10)


ATTACKS = [one_step, our_pgd, foolbox_fgsm, their_pgd]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_fool_just_outside_the_margin_and_never_inside(attack: partial[Tensor]) -> None:
    problem = linear_problem()
    classifier = problem.classifier.requires_grad_(False)
    attacked = partial(attack, classifier, problem.images, problem.labels)

    assert (classifier(problem.images).argmax(1) == problem.labels).all()
    assert (classifier(attacked(eps=0.97 * problem.margin)).argmax(1) == problem.labels).all()
    assert (classifier(attacked(eps=1.03 * problem.margin)).argmax(1) != problem.labels).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_image_stays_in_its_budget_and_in_range(attack: partial[Tensor]) -> None:
    classifier = smooth_classifier().requires_grad_(False)
    images = torch.rand(6, 3, 8, 8)
    images[0], images[1] = 0.0, 1.0  # there is room on one side only

    adversarial = attack(classifier, images, torch.arange(6) % 3, eps=0.1)

    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    distances = (adversarial - images).abs().flatten(1).amax(1)
    torch.testing.assert_close(distances, torch.full((6,), 0.1))  # used up by every image, by none exceeded
    assert distances.max() <= 0.1 + 1e-6


def test_our_pgd_is_as_strong_as_foolboxs_and_stronger_than_fgsm() -> None:
    classifier = smooth_classifier().requires_grad_(False)
    images = torch.rand(64, 3, 8, 8)
    labels = classifier(images).argmax(1)

    def loss(adversarial: Tensor) -> float:
        return F.cross_entropy(classifier(adversarial), labels).item()

    ours, theirs = (
        loss(our_pgd(classifier, images, labels, eps=0.2)),
        loss(their_pgd(classifier, images, labels, eps=0.2)),
    )
    single = loss(one_step(classifier, images, labels, eps=0.2))

    assert loss(images) < single < min(ours, theirs)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert single == pytest.approx(loss(foolbox_fgsm(classifier, images, labels, eps=0.2)))


def test_n_fgsm_is_a_signed_step_from_noise_that_is_not_projected() -> None:
    problem = linear_problem()

    attacked = noisy_fgsm(
        problem.classifier, problem.images, problem.labels, eps=0.05, noise=2.0, generator=generator()
    )

    noise = 2 * torch.rand(problem.images.shape, generator=generator()) - 1
    weight = problem.classifier.state_dict()["stages.head.weight"][1].view(3, 4, 4)
    away = (1 - 2 * problem.labels).view(-1, 1, 1, 1) * weight.sign()  # the loss of a linear classifier rises there
    torch.testing.assert_close(attacked, problem.images + 0.1 * noise + 0.05 * away)
    assert (attacked - problem.images).abs().max() > 0.12  # far outside the ball of 0.05


def test_no_steps_leave_a_uniform_draw_from_the_ball_that_the_generator_fixes() -> None:
    classifier, images = smooth_classifier(), torch.full((4, 3, 16, 16), 0.5)
    images[3] = 0.05
    start = partial(pgd_linf, classifier, images, torch.zeros(4, dtype=torch.int64), eps=0.1, steps=0, step_size=0.1)

    drawn = start(generator=torch.Generator().manual_seed(5))

    assert torch.equal(drawn, start(generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(drawn, start(generator=torch.Generator().manual_seed(6)))
    assert (drawn - images)[:3].mean().abs() < 0.01
    assert (drawn - images)[:3].std() == pytest.approx(0.2 / 12**0.5, rel=0.05)  # of a uniform draw over 0.2
    assert drawn[3].min() >= 0
    assert drawn[3].mean() == pytest.approx(0.075, abs=0.01)  # the half of the ball that is in [0, 1]


def test_the_gradient_is_that_of_each_images_own_loss() -> None:
    problem = linear_problem(count=2)

    gradient = loss_gradient(problem.classifier, problem.images, problem.labels)

    logits = problem.classifier(problem.images)
    weight = weight_of(problem.classifier, "stages.head.weight")[1].view(3, 4, 4)
    surplus = logits.softmax(1)[:, 1] - problem.labels
    torch.testing.assert_close(gradient, surplus.view(-1, 1, 1, 1) * weight)
    alone = loss_gradient(problem.classifier, problem.images[:1], problem.labels[:1])
    torch.testing.assert_close(alone, gradient[:1])


@pytest.mark.parametrize("attack", [one_step, our_pgd])
def test_no_weight_receives_a_gradient_even_where_gradients_are_off(attack: partial[Tensor]) -> None:
    problem = linear_problem()
    with torch.no_grad():
        adversarial = attack(problem.classifier, problem.images, problem.labels, eps=0.1)
    assert not torch.equal(adversarial, problem.images)
    assert not adversarial.requires_grad
    assert all(weight.grad is None for weight in problem.classifier.parameters())


@pytest.mark.parametrize("attack", [foolbox_fgsm, their_pgd])
def test_foolbox_attacks_frozen_classifiers_only(attack: partial[Tensor]) -> None:
    problem = linear_problem()
    with pytest.raises(ValueError, match="must not ask for gradients"):
        attack(problem.classifier, problem.images, problem.labels, eps=0.1)
    classifier = problem.classifier.requires_grad_(False)
    attack(classifier, problem.images, problem.labels, eps=0.1)
    assert all(weight.grad is None for weight in classifier.parameters())


# What else Foolbox runs


@pytest.mark.parametrize("attack", [partial(foolbox_mim, step_size=0.003), foolbox_deepfool])
def test_mim_and_deepfool_fool_outside_the_margin_and_never_inside(attack: partial[Tensor]) -> None:
    problem = linear_problem()
    classifier = problem.classifier.requires_grad_(False)
    for share, fools in ((0.97, False), (1.05, True)):
        moved = attack(classifier, problem.images, problem.labels, eps=share * problem.margin)
        assert ((classifier(moved).argmax(1) != problem.labels) == fools).all()
        assert (moved - problem.images).abs().max() <= share * problem.margin + 1e-6


def test_l2_attacks_fool_near_the_margin_in_their_norm() -> None:
    problem = linear_problem()
    classifier = problem.classifier.requires_grad_(False)
    weight = weight_of(classifier, "stages.head.weight")[1]
    distance = problem.margin * float(weight.abs().sum() / weight.norm())
    for share, fools in ((0.97, False), (1.03, True)):
        eps = share * distance
        moved = foolbox_pgd_l2(classifier, problem.images, problem.labels, eps=eps, steps=30, step_size=eps / 10)
        assert ((classifier(moved).argmax(1) != problem.labels) == fools).all()
    unbounded = foolbox_cw(classifier, problem.images, problem.labels)
    assert (classifier(unbounded).argmax(1) != problem.labels).all()
    lengths = (unbounded - problem.images).flatten(1).norm(dim=1)
    assert (lengths > distance).all()
    assert (lengths < 1.5 * distance).all()


def test_each_image_keeps_its_last_iterate_or_that_of_its_highest_value() -> None:
    """One image climbs all the way; the other is led downhill, beyond the top at 0.5."""
    images = torch.tensor([0.2, 0.4]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    tops, asked = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1), list[Tensor]()

    def misleading(images: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(images)
        return -(images - tops).abs().sum((1, 2, 3)), torch.ones_like(images)

    last, highest = (
        ascend(misleading, images, images, Linf(0.4), steps=4, step_size=0.1, keep=keep) for keep in ("last", "highest")
    )
    torch.testing.assert_close(last[:, 0, 0, 0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(highest[:, 0, 0, 0], torch.tensor([0.6, 0.5]))
    assert len(asked) == 4 + 5  # the highest is only known after a look at the last


def test_what_is_wrong_outranks_what_is_unsure() -> None:
    """The image that is right, at the higher loss, has the lower value."""
    logits = torch.tensor([[0.1, 0.0, 0.05, 0.05, 0.05], [0.0, 0.4, -9.0, -9.0, -9.0]])
    images, labels = torch.rand(2, 3, 4, 4, generator=generator()), torch.tensor([0, 0])

    value, _ = classified(lambda _: logits, labels)(images)
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert losses[0] > losses[1]
    assert value[0] < 0 < value[1]
    torch.testing.assert_close(value, margin(logits, labels))


def test_a_model_that_hands_no_gradient_back_leaves_images_where_they_are() -> None:
    problem = linear_problem()
    objective = classified(lambda x: problem.classifier(x.detach()).detach(), problem.labels)
    value, gradient = objective(problem.images)
    assert torch.equal(gradient, torch.zeros_like(problem.images))
    assert (value < 0).all()
    assert torch.equal(
        ascend(objective, problem.images, problem.images, Linf(0.1), steps=3, step_size=0.1), problem.images
    )


def test_an_iterate_whose_value_is_no_number_is_passed_over_and_so_is_such_a_gradient() -> None:
    images = torch.full((1, 3, 2, 2), 0.5)
    hole = torch.tensor([True, False]).expand(1, 3, 2, 2)

    def holed(x: Tensor) -> tuple[Tensor, Tensor]:
        value = x.sum((1, 2, 3))
        lost = (value > 7.0) & (value < 8.0)
        return torch.where(lost, torch.nan, value), torch.where(hole, torch.nan, torch.ones_like(x))

    moved = ascend(holed, images, images, Linf(0.4), steps=4, step_size=0.1, keep="highest")
    torch.testing.assert_close(moved, torch.where(hole, 0.5, 0.9))


def test_where_no_value_is_a_number_the_start_is_kept() -> None:
    images = torch.rand(2, 3, 4, 4, generator=generator())
    moved = ascend(
        lambda x: (torch.full((2,), torch.nan), torch.ones_like(x)),
        images,
        images,
        Linf(0.1),
        steps=2,
        step_size=0.05,
        keep="highest",
    )
    assert torch.equal(moved, images)
