"""Every attack as it is planned, against answers that are known: on a plane, and beside Foolbox's."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from models.aid import Aid, AidPurifier
from models.atop import AtopPurifier
from models.defense import DefendedClassifier, Purifier
from models.gate import GatePurifier
from models.manifest import AidPreset, AtopPreset
from models.zeropur import ZeroPurPurifier
from tests.fakes import LinearProblem, bare_bundle, linear_classifier, linear_problem, smooth_classifier
from tests.networks import zeropur_preset
from training import grey_box
from training.attacks.by_foolbox import foolbox_pgd, foolbox_pgd_l2
from training.attacks.looks import Looks
from training.attacks.pgd import ascend, classified
from training.attacks.threats import L2, Linf, Threat, assert_in_budget
from training.budgets import Budget, Effort
from training.evaluation import every_level
from training.plan import Planner
from training.subject import Attack, Subject

HARMLESS = 1e-4
"""What the purifiers here may change: next to nothing of the margin of 0.05, so that it stays known."""
EFFORT = Effort(
    images=8,
    bpda_steps=20,
    bpda_draws=3,
    full_steps=20,
    full_draws=3,
    apgd_steps=20,
    apgd_draws=3,
    square_queries=300,
    aware_steps=40,
    aware_weights=(1e-3,),
    iterate_steps=20,
    smooth_steps=20,
    unseen=True,
)
FAR_OUTSIDE = {"square": 4.0}
"""Random search needs room."""


class Untouched(nn.Module):
    """An in-painter that has nothing to fill, and hands on what it is given."""

    def forward(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        return [images]


class Natural(nn.Module):
    """In the place of AID: a logit that rises along one random direction, slowly, from `start`."""

    def __init__(self, problem: LinearProblem, start: float = 0.0) -> None:
        super().__init__()
        self.classifier, self.start = problem.classifier, start
        self.direction = torch.randn(problem.images.shape[1:], generator=torch.Generator().manual_seed(5))

    def logits(self, images: Tensor) -> Tensor:
        return self.start + 1e-3 * ((images - 0.5) * self.direction).sum((1, 2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).sigmoid()


def atop(problem: LinearProblem) -> Purifier:
    preset = AtopPreset(transform="rt2", working_size=4, sigma=HARMLESS, mask_ratio=0.0, cells_per_side=4)
    return AtopPurifier(Untouched(), preset)


def aid(problem: LinearProblem) -> Purifier:
    preset = AidPreset(eps=HARMLESS, step_size=HARMLESS / 2, steps=3)
    return AidPurifier(cast(Aid, Natural(problem)), preset)


def zeropur(problem: LinearProblem) -> Purifier:
    steps = {"coarse_steps": 2, "coarse_step_size": HARMLESS, "fine_steps": 2, "fine_step_size": HARMLESS}
    preset = zeropur_preset(eps=HARMLESS, fine_layers=("pool",), **steps)
    return ZeroPurPurifier(problem.classifier, preset)


def gate(problem: LinearProblem) -> Purifier:
    """Everything passes it, and meets nothing behind it."""
    return GatePurifier(cast(Aid, Natural(problem, start=3.0)), 0.5, cheap=[], strong=[])


DEFENSES: dict[str, tuple[Callable[[LinearProblem], Purifier] | None, set[str]]] = {
    "none": (None, {"fgsm", "pgd20", "mim", "deepfool", "di2", "full", "apgd_ce", "square", "transfer_itself"}),
    "atop": (atop, {"bpda", "full", "apgd_ce", "fixed_look", "square"}),
    "aid": (aid, {"bpda", "full", "apgd_ce", "aware_aid_0.001", "iterates", "smooth_steps_3"}),
    "zeropur": (zeropur, {"bpda", "full", "apgd_ce", "aware_zeropur_0.001", "iterates", "smooth_steps_3"}),
    "auto": (gate, {"bpda", "full", "apgd_ce", "past_gate"}),
}


def planned(defense: str, problem: LinearProblem, eps: float) -> dict[str, tuple[Subject, Attack]]:
    """Every attack on a defense, by name."""
    build, _ = DEFENSES[defense]
    subject = Subject(defense, DefendedClassifier(problem.classifier, [build(problem)] if build else []))
    names = ("fgsm", "pgd20", "mim", "deepfool", "di2")
    budget = Budget(
        clean_images=8, grey_box_images=8, costly_images=8, grey_box=names, one_pass=EFFORT, descending=EFFORT
    )
    planner = Planner(
        problem.classifier, budget, eps, 0, {"itself": bare_bundle(problem.classifier, ("no", "yes"), 4)}, 2
    )
    return {attack.name: (subject, attack) for attack in every_level(planner, subject)}


def fooled(defense: str, name: str, eps: float, margin: float = 0.05) -> list[bool]:
    """Which images the attack turns, judged by a look that it has not seen."""
    problem = linear_problem(margin=margin)
    problem.classifier.requires_grad_(False)
    subject, attack = planned(defense, problem, eps)[name]
    assert attack.threat is not None
    moved = attack.run(problem.images, problem.labels, range(8))
    assert_in_budget(moved, problem.images, attack.threat, name)
    with torch.no_grad():
        answers = subject.defended.vote(moved, Looks(99, range(8)).next(), 0).argmax(1)
    turned: list[bool] = (answers != problem.labels).tolist()
    return turned


@pytest.mark.parametrize(
    ("defense", "name"), [(defense, name) for defense, (_, names) in DEFENSES.items() for name in sorted(names)]
)
def test_planned_attacks_fool_just_outside_the_margin_and_never_inside(defense: str, name: str) -> None:
    margin = linear_problem().margin
    assert not any(fooled(defense, name, 0.97 * margin))
    assert all(fooled(defense, name, FAR_OUTSIDE.get(name, 1.03) * margin))


UNSEEN = {"eps_times_0.5": 0.5, "eps_times_2": 2.0, "known_seed": 1.0}
"""Attacks of L6 in l-inf, and the share of the evaluation's eps that each may change."""


@pytest.mark.parametrize(
    ("defense", "name"),
    [(defense, name) for defense in DEFENSES for name in UNSEEN if name != "known_seed" or defense == "atop"],
)
def test_attacks_with_another_bound_or_the_seed_fool_just_outside_the_margin_too(defense: str, name: str) -> None:
    margin = linear_problem().margin / UNSEEN[name]
    assert not any(fooled(defense, name, 0.97 * margin))
    assert all(fooled(defense, name, 1.03 * margin))


@pytest.mark.parametrize("defense", DEFENSES)
def test_the_attack_in_l2_fools_just_outside_the_margin_and_never_inside(defense: str) -> None:
    w = linear_problem().classifier.state_dict()["stages.head.weight"][1]
    margin = grey_box.L2_EPS * float(w.norm() / w.abs().sum())  # that far in l-inf is as far as its bound in l2
    assert not any(fooled(defense, "l2", 8 / 255, margin / 0.97))
    assert all(fooled(defense, "l2", 8 / 255, margin / 1.03))


def test_no_attack_on_these_defenses_goes_without_a_referee() -> None:
    for defense, (_, names) in DEFENSES.items():
        found = {name for name, (_, attack) in planned(defense, linear_problem(), 0.05).items() if attack.level != "L1"}
        refereed = names | DEFENSES["none"][1] | UNSEEN.keys() | {"l2", "stadv"}  # these two have tests of their own
        assert found <= refereed, defense


def test_carlini_and_wagners_attack_stops_where_the_other_class_begins() -> None:
    """It has no bound, but finds the nearest point: the l2 distance to the plane, and never less."""
    problem = linear_problem()
    classifier = problem.classifier.requires_grad_(False)
    weight = classifier.state_dict()["stages.head.weight"][1]
    distance = problem.margin * float(weight.abs().sum() / weight.norm())
    moved = grey_box.attack("cw", classifier, eps=0.05, seed=0).run(problem.images, problem.labels, range(8))
    assert (classifier(moved).argmax(1) != problem.labels).all()
    moves = (moved - problem.images).flatten(1).norm(dim=1)
    assert moves.min() >= 0.999 * distance
    assert moves.max() <= 1.5 * distance


@pytest.mark.parametrize(("threat", "steps"), [(Linf(0.05), 10), (Linf(0.1), 40), (L2(0.5), 10), (L2(1.0), 40)])
def test_our_ascent_fools_as_many_as_foolboxs_in_either_norm(threat: Threat, steps: int) -> None:
    classifier = smooth_classifier(8).requires_grad_(False)
    images = 0.2 + 0.6 * torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    order = classifier(images).sort(1, descending=True)
    labels = order.indices[:, 0]
    step_size = 2.5 * threat.eps / steps
    torch.manual_seed(0)
    theirs_of = foolbox_pgd if isinstance(threat, Linf) else foolbox_pgd_l2
    theirs = theirs_of(classifier, images, labels, eps=threat.eps, steps=steps, step_size=step_size)
    ours = ascend(classified(classifier, labels), images, images, threat, steps=steps, step_size=step_size)
    for moved in (ours, theirs):
        assert_in_budget(moved, images, threat, "the attack")
    ours_share, theirs_share = (float((classifier(x).argmax(1) != labels).float().mean()) for x in (ours, theirs))
    assert theirs_share > 0.1
    assert ours_share >= theirs_share - 0.02


def test_di2_takes_another_way_than_plain_ascent_and_still_lowers_the_right_logit() -> None:
    classifier = smooth_classifier().requires_grad_(False)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = classifier(images).argmax(1)
    attack = grey_box.attack("di2", classifier, eps=0.05, seed=0)
    diverse = attack.run(images, labels, range(6))
    plain = ascend(
        classified(classifier, labels), images, images, Linf(0.05), steps=grey_box.DI2_STEPS, step_size=0.05 / 8
    )
    assert not torch.equal(diverse, plain)
    before, after = (classifier(x).gather(1, labels[:, None]) for x in (images, diverse))
    assert (after < before).all()


def test_images_are_transferred_from_the_other_network() -> None:
    """What attacks a network that takes each class for the other moves images away from where this one is fooled."""
    problem = linear_problem()
    problem.classifier.requires_grad_(False)
    state = problem.classifier.state_dict()
    weight, bias = state["stages.head.weight"], state["stages.head.bias"]
    opposite = linear_classifier(-weight, -bias).requires_grad_(False)
    budget = Budget(clean_images=8, grey_box_images=8, costly_images=8, one_pass=EFFORT, descending=EFFORT)
    planner = Planner(problem.classifier, budget, 0.06, 0, {"turned": bare_bundle(opposite, ("no", "yes"), 4)}, 2)
    subject = Subject("none", DefendedClassifier(problem.classifier, []))
    attack = planner.transferred("turned", planner.transfer["turned"], EFFORT)
    moved = attack.run(problem.images, problem.labels, range(8))
    assert attack.level == "L5"
    assert (subject.defended(moved).argmax(1) == problem.labels).all()
