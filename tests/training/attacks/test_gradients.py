from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blur import blur
from models.defense import DefendedClassifier
from models.gate import GatePurifier
from models.manifest import BlurSpec
from models.randomness import normal
from tests.fakes import linear_problem
from tests.networks import SIZE, tiny_aid, tiny_bundle, tiny_classifier, zeropur_preset
from training.attacks.gradients import around, diverse, past_the_gate, through, while_aligned, while_natural
from training.attacks.looks import Looks, Oracle, SameLook
from training.attacks.pgd import Objective, ascend, cross_entropy, differentiated, loss_gradient, margin
from training.attacks.threats import L2, Linf, assert_in_budget

IMAGES = 0.2 + 0.6 * torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0])


class Noise(nn.Module):
    """A purifier that halves images and adds noise; where the derivative is a half, BPDA believes in one."""

    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return 0.5 * images + 0.05 * normal(seeds, images.shape[1:], images.device)


def noisy() -> DefendedClassifier:
    return DefendedClassifier(tiny_classifier(), [Noise()])


def plain_gradient(defended: DefendedClassifier, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    images = images.clone().requires_grad_()
    F.cross_entropy(defended.vote(images, seeds, 0), labels, reduction="sum").backward()
    assert images.grad is not None
    return images.grad


def test_the_full_gradient_is_the_mean_of_exact_gradients_over_looks() -> None:
    defended, looks = noisy(), Looks(7, range(5))

    value, gradient = through(defended, LABELS, Looks(7, range(5)), draws=3)(IMAGES)

    seeds = [looks.next() for _ in range(3)]
    margins = [margin(defended.vote(IMAGES, s, 0), LABELS) for s in seeds]
    torch.testing.assert_close(value, torch.stack(margins).mean(0))
    expected = torch.stack([plain_gradient(defended, IMAGES, LABELS, s) for s in seeds]).mean(0)
    torch.testing.assert_close(gradient, expected)


def test_bpda_is_the_classifiers_gradient_at_the_purified_images() -> None:
    defended, looks = noisy(), Looks(7, range(5))

    value, gradient = around(defended, LABELS, Looks(7, range(5)), draws=2)(IMAGES)

    purified = [defended.purify(IMAGES, looks.next()) for _ in range(2)]
    expected = torch.stack([loss_gradient(defended.classifier, images, LABELS) for images in purified]).mean(0)
    torch.testing.assert_close(gradient, expected)
    same_value, exact = through(defended, LABELS, Looks(7, range(5)), draws=2)(IMAGES)
    torch.testing.assert_close(exact, 0.5 * gradient)
    torch.testing.assert_close(same_value, value)


def test_the_full_gradient_of_several_votes_is_that_of_their_mean() -> None:
    several, seeds = DefendedClassifier(tiny_classifier(), [Noise()], votes=3), Looks(7, range(5)).next()

    value, gradient = through(several, LABELS, Looks(7, range(5)), draws=1)(IMAGES)

    images = IMAGES.clone().requires_grad_()
    mean = torch.stack([several.vote(images, seeds, vote).softmax(1) for vote in range(3)]).mean(0)
    (expected,) = torch.autograd.grad(F.nll_loss(mean.log(), LABELS, reduction="sum"), images)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, margin(mean.detach().log(), LABELS))


def test_bpda_of_several_votes_is_the_gradient_of_their_mean_at_the_purified_images() -> None:
    several, seeds = DefendedClassifier(tiny_classifier(), [Noise()], votes=3), Looks(7, range(5)).next()

    value, gradient = around(several, LABELS, Looks(7, range(5)), draws=1)(IMAGES)

    shift = torch.zeros_like(IMAGES, requires_grad=True)
    purified = [several.purify(IMAGES, seeds, vote) for vote in range(3)]
    mean = torch.stack([several.classifier(each + shift).softmax(1) for each in purified]).mean(0)
    (expected,) = torch.autograd.grad(F.nll_loss(mean.log(), LABELS, reduction="sum"), shift)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, margin(mean.detach().log(), LABELS))


@pytest.mark.parametrize("way", [through, around])
def test_every_step_looks_anew_and_a_deterministic_defense_once(way: Callable[..., Objective]) -> None:
    looks = Looks(7, range(5))
    objective = way(noisy(), LABELS, looks, draws=4)
    assert not torch.equal(objective(IMAGES)[1], objective(IMAGES)[1])
    assert looks.made == 8

    looks = Looks(7, range(5))
    way(DefendedClassifier(tiny_classifier(), []), LABELS, looks, draws=4)(IMAGES)
    assert looks.made == 1


def test_an_image_is_attacked_alike_alone_and_among_others() -> None:
    _, whole = through(noisy(), LABELS, Looks(7, range(5)), draws=2)(IMAGES)
    _, alone = through(noisy(), LABELS[3:4], Looks(7, [3]), draws=2)(IMAGES[3:4])
    torch.testing.assert_close(alone, whole[3:4])


def test_the_same_look_never_changes_and_is_the_first() -> None:
    same, looks = SameLook(7, [4, 9]), Looks(7, [4, 9])
    first = looks.next()
    assert same.next() == same.next() == first
    assert looks.next() != first
    assert len(set(first)) == 2


def test_an_oracle_answers_as_the_defense_does_and_draws_anew() -> None:
    oracle = Oracle(noisy(), seed=3)
    one, two = oracle(IMAGES), oracle(IMAGES)
    assert not torch.equal(one, two)
    assert torch.equal(one, Oracle(noisy(), seed=3)(IMAGES))
    assert oracle.queries == 10
    several = Oracle(noisy(), seed=3, looks=64)(IMAGES).softmax(1)
    torch.testing.assert_close(several.sum(1), torch.ones(5))
    assert (several - one.softmax(1)).abs().max() > 0


@pytest.mark.parametrize("way", [through, around])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_attacks_through_a_defense_fool_just_outside_the_margin_and_never_inside(
    way: Callable[..., Objective], norm: type[Linf] | type[L2]
) -> None:
    problem = linear_problem()
    classifier = problem.classifier.requires_grad_(False)
    weight = classifier.state_dict()["stages.head.weight"][1]
    # The same plane, seen in the other norm: |w x| / |w|_2 instead of |w x| / |w|_1.
    distance = problem.margin if norm is Linf else problem.margin * float(weight.abs().sum() / weight.norm())
    defended = DefendedClassifier(classifier, [])

    def fooled(eps: float) -> list[bool]:
        objective = way(defended, problem.labels, Looks(0, range(8)), draws=1)
        moved = ascend(objective, problem.images, problem.images, norm(eps), steps=20, step_size=eps / 4)
        assert_in_budget(moved, problem.images, norm(eps), "the attack")
        labels: list[int] = classifier(moved).argmax(1).tolist()
        return [label != right for label, right in zip(labels, problem.labels.tolist(), strict=True)]

    assert not any(fooled(0.98 * distance))
    assert all(fooled(1.02 * distance))


def test_the_margin_is_the_best_wrong_logit_minus_the_right_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [-1.0, 1.0]


# Attacks that know what the defense looks at


def test_the_attack_on_aid_adds_the_log_of_the_score() -> None:
    aid = tiny_aid(tiny_classifier())
    images = IMAGES.clone().requires_grad_()
    wanted = F.cross_entropy(aid.classifier(images), LABELS, reduction="none") + 3 * aid(images).log()
    (expected,) = torch.autograd.grad(wanted.sum(), images)
    value, gradient = while_natural(aid, LABELS, weight=3.0)(IMAGES)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, wanted.detach())


def test_the_attack_on_aid_looks_more_natural_than_one_that_does_not_care() -> None:
    aid, threat = tiny_aid(tiny_classifier()), Linf(0.05)
    scores = []
    for weight in (0.0, 10.0):
        objective = while_natural(aid, LABELS, weight=weight)
        moved = ascend(objective, IMAGES, IMAGES, threat, steps=10, step_size=0.01)
        assert_in_budget(moved, IMAGES, threat, "the attack")
        scores.append(aid.logits(moved))
    assert (scores[1] > scores[0]).all()


def test_the_attack_on_the_gate_climbs_the_end_that_is_farther_off() -> None:
    aid = tiny_aid(tiny_classifier())
    passed = DefendedClassifier(aid.classifier, [])
    logits, wrong = aid.logits(IMAGES), margin(aid.classifier(IMAGES), LABELS)
    # A threshold at which some images lack more to pass, and others more to be misclassified.
    threshold = float((logits - wrong).sort().values[1:3].mean().sigmoid())
    gate = GatePurifier(aid, threshold, cheap=[], strong=[Noise()])

    value, gradient = past_the_gate(gate, passed, LABELS, Looks(0, range(5)), draws=1)(IMAGES)

    natural = logits - torch.tensor(threshold).logit()
    torch.testing.assert_close(value, torch.minimum(wrong, natural))
    to_pass = differentiated(aid.logits)(IMAGES)[1]
    to_fool = differentiated(lambda x: margin(aid.classifier(x), LABELS))(IMAGES)[1]
    assert 0 < int((wrong < natural).sum()) < 5
    for index, fooling_first in enumerate((wrong < natural).tolist()):
        torch.testing.assert_close(gradient[index], (to_fool if fooling_first else to_pass)[index])


class LinearScore(nn.Module):
    """In the place of AID: a logit that rises along one random direction, and is -1 at every one of `images`."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.direction = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(5))

    def logits(self, images: Tensor) -> Tensor:
        return ((images - self.images) * self.direction).sum((1, 2, 3)) - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).sigmoid()


def test_the_attack_on_the_gate_gets_images_past_it_that_are_wrong_behind() -> None:
    problem, threat = linear_problem(), Linf(0.15)
    gate = GatePurifier(LinearScore(problem.images), 0.5, cheap=[], strong=[])  # type: ignore[arg-type]
    passed = DefendedClassifier(problem.classifier, [])
    looks = Looks(0, range(8))

    moved = ascend(
        past_the_gate(gate, passed, problem.labels, looks, draws=1),
        problem.images,
        problem.images,
        threat,
        steps=40,
        step_size=0.01,
        keep="highest",
    )

    assert_in_budget(moved, problem.images, threat, "the attack")
    assert gate.suspects(problem.images).all()
    assert not gate.suspects(moved).any()
    assert (problem.classifier(moved).argmax(1) != problem.labels).all()


@pytest.mark.parametrize("kind", ["gaussian", "median"])
def test_the_attack_on_zeropur_agrees_with_its_blurred_copy_more_than_one_that_does_not_care(kind: str) -> None:
    classifier, spec, threat = tiny_classifier(), BlurSpec.model_validate({"kind": kind, "size": 3}), Linf(0.05)
    agreements, preset = [], zeropur_preset(blur=spec)
    for weight in (0.0, 100.0):
        objective = while_aligned(classifier, preset, LABELS, weight=weight)
        moved = ascend(objective, IMAGES, IMAGES, threat, steps=10, step_size=0.01)
        agreements.append(F.cosine_similarity(classifier.embedding(moved), classifier.embedding(blur(moved, spec))))
    assert (agreements[1] > agreements[0]).all()


def test_the_attack_on_zeropur_with_coarse_layers_weighs_the_mean_of_their_cosines() -> None:
    classifier, preset = tiny_classifier(), zeropur_preset(coarse_layers=("stage1", "pool"))
    value, _ = while_aligned(classifier, preset, LABELS, weight=3.0)(IMAGES)
    layers = (classifier.features(x, ("stage1", "pool")) for x in (IMAGES, blur(IMAGES, preset.blur)))
    cosines = [F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(*layers, strict=True)]
    expected = cross_entropy(classifier(IMAGES), LABELS) - 3.0 * (1 - torch.stack(cosines).mean(0))
    torch.testing.assert_close(value, expected)


def test_diverse_inputs_are_a_resized_padded_image_through_which_the_gradient_comes_back() -> None:
    classifier = tiny_classifier()
    plain = differentiated(lambda x: cross_entropy(classifier(x), LABELS))
    generator = torch.Generator().manual_seed(0)

    assert torch.equal(diverse(plain, generator, probability=0.0)(IMAGES)[1], plain(IMAGES)[1])
    looked_at = list[Tensor]()
    for draw in range(20):
        there = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(draw))

        def objective(images: Tensor, there: Tensor = there) -> tuple[Tensor, Tensor]:
            looked_at.append(images)
            return images.flatten(1).sum(1), there

        value, back = diverse(objective, generator, probability=1.0)(IMAGES)
        torch.testing.assert_close(value, looked_at[-1].flatten(1).sum(1))
        # Resizing and padding are linear, so the way back is their adjoint.
        seen_there, felt_here = ((a * b).flatten(1).sum(1) for a, b in ((looked_at[-1], there), (IMAGES, back)))
        torch.testing.assert_close(seen_there, felt_here, rtol=1e-4, atol=1e-4)
    assert len({float(images.sum()) for images in looked_at}) >= 3
    assert any((images == 0).any() for images in looked_at)  # a padded border
    assert all(images.shape == IMAGES.shape for images in looked_at)


def test_attacks_through_every_shipped_kind_of_defense_raise_the_loss() -> None:
    bundle = tiny_bundle()
    for defense in ("atop:rt1", "atop:rt2", "atop:rt3", "aid", "zeropur", "atop,aid"):
        defended = bundle.defended(defense)
        objective = through(defended, LABELS, Looks(0, range(5)), draws=2)
        moved = ascend(objective, IMAGES, IMAGES, Linf(0.1), steps=5, step_size=0.04)
        verdict = Looks(99, range(5)).next()
        with torch.no_grad():
            before, after = (cross_entropy(defended.vote(x, verdict, 0), LABELS) for x in (IMAGES, moved))
        assert after.mean() > before.mean(), defense
