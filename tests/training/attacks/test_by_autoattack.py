from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.classifiers import Classifier
from tests.fakes import linear_classifier, linear_problem, smooth_classifier
from tests.networks import tiny_classifier
from training.attacks.by_autoattack import apgd, autoattack, rand, square
from training.attacks.pgd import cross_entropy, margin, pgd_linf
from training.attacks.threats import L2, Linf, assert_in_budget


def four_classes(two: Classifier) -> Classifier:
    """The same problem with two more classes that nothing can reach, and logits that leave cross-entropy a gradient."""
    state = two.state_dict()
    weight, bias = state["stages.head.weight"] / 20, state["stages.head.bias"] / 20
    padded = torch.cat([weight, torch.zeros_like(weight)])
    return linear_classifier(padded, torch.cat([bias, torch.tensor([-1e3, -2e3])])).requires_grad_(False)


ATTACKS = {
    "apgd-ce": partial(apgd, loss="ce", steps=20, draws=1, seed=0, is_random=False),
    "apgd-dlr": partial(apgd, loss="dlr", steps=20, draws=2, seed=0, is_random=True),
    "rand": partial(rand, steps=20, draws=2, seed=0, is_random=True),
    "autoattack": partial(autoattack, seed=0),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("norm", [Linf, L2])
def test_it_fools_just_outside_the_margin_and_never_inside(
    attack: partial[Tensor], norm: type[Linf] | type[L2]
) -> None:
    problem = linear_problem(side=16)
    classifier = four_classes(problem.classifier)
    weight = classifier.state_dict()["stages.head.weight"][1]
    distance = problem.margin if norm is Linf else problem.margin * float(weight.abs().sum() / weight.norm())

    def fooled(eps: float) -> list[bool]:
        moved = attack(classifier, problem.images, problem.labels, norm(eps))
        assert_in_budget(moved, problem.images, norm(eps * (1 + 1e-5)), "the attack")
        labels: list[int] = classifier(moved).argmax(1).tolist()
        return [label != right for label, right in zip(labels, problem.labels.tolist(), strict=True)]

    assert not any(fooled(0.97 * distance))
    assert all(fooled(1.03 * distance))


def test_square_needs_no_gradient_and_stays_in_its_budget() -> None:
    problem = linear_problem()
    classifier = four_classes(problem.classifier)
    asked = 0

    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            nonlocal asked
            asked += len(images)
            assert not torch.is_grad_enabled()
            logits: Tensor = classifier(images)
            return logits

    def fooled(eps: float) -> list[bool]:
        moved = square(Blind(), problem.images, problem.labels, Linf(eps), queries=300, seed=0, is_random=False)
        assert_in_budget(moved, problem.images, Linf(eps), "Square")
        labels: list[int] = classifier(moved).argmax(1).tolist()
        return [label != right for label, right in zip(labels, problem.labels.tolist(), strict=True)]

    assert not any(fooled(0.97 * problem.margin))
    assert all(fooled(4 * problem.margin))
    assert asked <= 2 * 8 * (300 + 3)


def test_apgd_is_at_least_as_strong_as_our_pgd() -> None:
    classifier = smooth_classifier().requires_grad_(False)
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = classifier(images).argmax(1)
    ours = pgd_linf(classifier, images, labels, eps=0.1, steps=30, step_size=0.01, generator=torch.Generator())
    theirs = apgd(classifier, images, labels, Linf(0.1), loss="ce", steps=30, draws=1, seed=0, is_random=True)
    losses = [cross_entropy(classifier(moved), labels).mean().item() for moved in (images, ours, theirs)]
    assert losses[0] < losses[1] < losses[2] * 1.01


def test_of_a_deterministic_model_what_it_misclassifies_is_kept_whatever_the_loss() -> None:
    """Near the start class 2 wins, barely; higher up the right class does, at a higher loss: five others are close."""

    class Folded(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            height = (images - 0.5).mean((1, 2, 3))
            near = height < 0.05
            right, wrong = torch.zeros_like(height), torch.where(near, 0.1 + height, -0.1)
            others = torch.where(near, -9.0, -0.1)
            return torch.stack([right, others, wrong, others, others, others], dim=1)

    images, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    attack = partial(apgd, Folded(), images, labels, Linf(0.1), loss="ce", steps=40, draws=1, seed=0)
    wrong = Folded()(attack(is_random=False)).argmax(1) != labels
    surer = Folded()(attack(is_random=True)).argmax(1) != labels
    assert wrong.all()
    assert not surer.any()


def test_square_goes_on_beyond_the_first_wrong_answer_of_a_random_model() -> None:
    problem = linear_problem()
    classifier = four_classes(problem.classifier)
    attack = partial(square, classifier, problem.images, problem.labels, Linf(4 * problem.margin), queries=300, seed=0)
    stopped, went_on = (margin(classifier(attack(is_random=is_random)), problem.labels) for is_random in (False, True))
    assert (stopped > 0).all()
    assert (went_on > 2 * stopped).all()


@pytest.mark.parametrize("attack", [ATTACKS["apgd-ce"], ATTACKS["apgd-dlr"]])
def test_a_model_that_hands_no_gradient_back_is_attacked_in_vain(attack: partial[Tensor]) -> None:
    problem = linear_problem()
    classifier, threat = four_classes(problem.classifier), Linf(0.97 * problem.margin)

    class Detached(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = classifier(images.detach())
            return logits

    moved = attack(Detached(), problem.images, problem.labels, threat)
    assert_in_budget(moved, problem.images, Linf(threat.eps * (1 + 1e-5)), "the attack")


def test_rand_keeps_the_better_of_its_two_attacks() -> None:
    """Of saturated logits the cross-entropy has no gradient; the ratio of their differences does."""
    problem = linear_problem()
    classifier = four_classes(problem.classifier)

    class Saturated(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = 1e6 * classifier(images)
            return logits

    threat = Linf(1.05 * problem.margin)
    fooled = {
        name: (classifier(attack(Saturated(), problem.images, problem.labels, threat)).argmax(1) != problem.labels)
        for name, attack in ATTACKS.items()
    }
    assert not fooled["apgd-ce"].all()
    assert fooled["rand"].all()

    smooth = smooth_classifier().requires_grad_(False)
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = smooth(images).argmax(1)
    ce, dlr, both = (
        margin(smooth(ATTACKS[name](smooth, images, labels, Linf(0.03))), labels)
        for name in ("apgd-ce", "apgd-dlr", "rand")
    )
    assert (ce > dlr).any()
    assert (dlr > ce).any()
    torch.testing.assert_close(both, torch.maximum(ce, dlr))


def test_two_classes_are_refused() -> None:
    problem = linear_problem()
    with pytest.raises(ValueError, match="four classes"):
        autoattack(problem.classifier, problem.images, problem.labels, Linf(0.1), seed=0)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_network_in_another_memory_layout_is_attacked_alike(attack: partial[Tensor]) -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        classifier = tiny_classifier().to(memory_format=layout)  # type: ignore[call-overload]
        moved.append(attack(classifier, images.to(memory_format=layout), classifier(images).argmax(1), Linf(0.1)))
    assert (moved[0] - moved[1]).abs().gt(1e-3).float().mean() < 0.02  # a sign turns where a gradient is nearly zero
