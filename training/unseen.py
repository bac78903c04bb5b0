"""What stays out of the worst case: threats of level L6, attacks that a recipe asks for, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from models.randomness import derive_seed
from training import grey_box
from training.attacks import by_autoattack, gradients
from training.attacks.looks import Looks, Oracle, SameLook
from training.attacks.stadv import confidence, stadv
from training.attacks.threats import L2, Linf, Threat
from training.budgets import FurtherAttack
from training.plan import Planner
from training.subject import Attack, Subject, Work

OTHER_BUDGETS = (0.5, 2.0)
STADV_STEPS = 100
THREATS: Mapping[str, type[Linf | L2]] = {"linf": Linf, "l2": L2}


def unseen(planner: Planner, subject: Subject) -> list[Attack]:
    """L6: threats that the defense was not made for; they stay out of the worst case."""
    effort, defended = planner.effort(subject), subject.defended
    if not effort.unseen:
        return []
    effort = effort.model_copy(update={"images": min(effort.images, effort.unseen_images or effort.images)})

    def climb(name: str, threat: Threat, kind: type[Looks] = Looks) -> list[Attack]:
        draws = planner.draws(subject, effort.full_draws) if kind is Looks else 1
        return planner.climbs(
            name,
            "L6",
            effort,
            effort.full_steps,
            lambda labels, looks: gradients.through(defended, labels, looks, draws=draws),
            Work(looks=1),
            threat=threat,
            looks=kind,
            draws=draws,
        )

    def chosen(numbers: Sequence[int]) -> list[int]:
        return SameLook(derive_seed(planner.seed, "attack", "known_seed"), numbers).next()

    found = climb("l2", L2(grey_box.L2_EPS))
    for factor in OTHER_BUDGETS:
        found += climb(f"eps_times_{factor:g}", Linf(factor * planner.eps))
    if defended.is_random:
        known = climb("known_seed", Linf(planner.eps), SameLook)
        found += [replace(attack, known_seeds=chosen) for attack in known]
    return [*found, moved(planner, subject, "stadv", effort.images, STADV_STEPS, effort.bpda_draws)]


def moved(planner: Planner, subject: Subject, name: str, count: int, steps: int, draws: int) -> Attack:
    """L6: pixels that move (StAdv), found on the whole defense."""
    draws = planner.draws(subject, draws)

    def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        looks = Looks(derive_seed(planner.seed, "stadv"), numbers)
        return stadv(subject.defended, images, labels, looks, steps=steps, draws=draws)

    settings = {"steps": steps, "draws": draws, "confidence": confidence(subject.defended)}
    return Attack(name, "L6", settings, count, run, None, Work(looks=steps * draws))


def requested(planner: Planner, subject: Subject, wanted: FurtherAttack) -> Attack:
    """L6: an attack that a recipe spells out."""
    defended, draws = subject.defended, planner.draws(subject, wanted.draws)
    if wanted.norm is None or wanted.eps is None:
        return moved(planner, subject, wanted.name, wanted.images, wanted.steps, wanted.draws)
    threat = THREATS[wanted.norm](wanted.eps)
    if wanted.attack == "rand":
        return rand(planner, subject, wanted, threat)
    if wanted.weight is not None:
        return looking_natural(planner, subject, wanted, wanted.weight, threat)
    towards, look = {
        "pgd": (gradients.through, Work(looks=1)),
        "bpda": (gradients.around, Work(bare=defended.votes, answers=1)),
    }[wanted.attack]
    (attack,) = planner.climbs(
        wanted.name,
        "L6",
        planner.effort(subject),
        wanted.steps,
        lambda labels, looks: towards(defended, labels, looks, draws=draws),
        look,
        threat=threat,
        draws=draws,
    )
    kind = {"attack": wanted.attack, "norm": wanted.norm}
    return replace(attack, images=wanted.images, settings={**attack.settings, **kind})


def looking_natural(
    planner: Planner, subject: Subject, wanted: FurtherAttack, weight: float, threat: Linf | L2
) -> Attack:
    """The auxiliary-aware attack on classifier and discriminator, whose images every defense is given."""
    aid = planner.aid
    assert aid is not None, "a bundle without AID is refused before anything is planned"
    (attack,) = planner.climbs(
        wanted.name,
        "L6",
        planner.effort(subject),
        wanted.steps,
        lambda labels, looks: gradients.while_natural(aid, labels, weight=weight),
        Work(bare=2, answers=0),
        threat=threat,
    )
    kind = {"attack": wanted.attack, "norm": wanted.norm, "weight": weight}
    return replace(attack, images=wanted.images, settings={**attack.settings, **kind}, shared=True)


def rand(planner: Planner, subject: Subject, wanted: FurtherAttack, threat: Linf | L2) -> Attack:
    """AutoAttack `rand` on the whole defense."""
    draws = planner.draws(subject, wanted.draws)

    def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        seed = derive_seed(planner.seed, wanted.name, numbers[0])
        oracle = Oracle(subject.defended, seed)
        return by_autoattack.rand(
            oracle,
            images,
            labels,
            threat,
            steps=wanted.steps,
            draws=draws,
            seed=seed % 2**31,
            is_random=subject.defended.is_random,
        )

    keep = by_autoattack.keeps(subject.defended.is_random)
    settings = wanted.model_dump(include={"attack", "norm", "eps", "steps"}) | {"draws": draws, "keep": keep}
    work = Work(looks=2 * wanted.steps * draws)
    return Attack(wanted.name, "L6", settings, wanted.images, run, threat, work)


def curve_points(planner: Planner, subject: Subject) -> dict[str, list[tuple[float, Attack]]]:
    """The full-gradient attack at several eps, with several numbers of steps, and of draws: value and attack."""
    effort, defended = planner.effort(subject), subject.defended
    if not effort.curve_images:
        return {}
    usual, usual_draws = max(1, effort.full_steps), planner.draws(subject, effort.full_draws)

    def point(share: float = 1.0, steps: int = usual, draws: int = usual_draws) -> Attack:
        averaged = "" if draws == usual_draws else f"_draws_{draws}"
        (attack,) = planner.climbs(
            f"curve_eps_{share:g}_steps_{steps}{averaged}",
            "L6",
            effort,
            steps,
            lambda labels, looks: gradients.through(defended, labels, looks, draws=draws),
            Work(looks=1),
            threat=Linf(share * planner.eps),
            draws=draws,
        )
        return replace(attack, images=effort.curve_images)

    points: dict[str, list[tuple[float, Attack]]] = {
        "eps": [(share * planner.eps, point(share=share)) for share in effort.curve_eps],
        "steps": [(steps, point(steps=steps)) for steps in effort.curve_steps],
    }
    if defended.is_random and effort.curve_draws:
        points["draws"] = [(draws, point(draws=draws)) for draws in effort.curve_draws]
    return points
