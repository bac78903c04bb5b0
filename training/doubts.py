"""Why a robust accuracy is not to be believed: the checks of `credibility` on the images of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.randomness import derive_seed
from training import credibility
from training.evaluation import Evaluation, clean_work
from training.subject import Subject, Work


class Looked(NamedTuple):
    """How closely `health` looks: at so many images, with so many steps within eps, and without bounds."""

    images: int
    steps: int
    far_steps: int


HEALTH = Looked(images=64, steps=8, far_steps=10)
COSTLY_HEALTH = Looked(images=10, steps=4, far_steps=5)


def doubts(
    evaluation: Evaluation,
    subject: Subject,
    *,
    clean: Tensor,
    right: Mapping[str, Tensor],
    levels: Mapping[str, str],
    against_steps: Sequence[tuple[int, Tensor]],
) -> list[str]:
    """One sentence for each reason; none for a defense that its attackers could follow.

    `clean` are all clean images asked about, (M,). `right` says which images withstood each attack of the worst case,
    the same N images for each; `against_steps` which withstood so many steps of the full-gradient attack.
    """
    reasons = health(evaluation, subject, clean)
    strong = evaluation.behind_the_gate(subject)
    if strong is not subject:  # the gate lets clean images pass it
        count, _ = clean_work(evaluation, strong)
        behind = health(evaluation, strong, evaluation.clean(strong, count, 1)[0])
        reasons += [f"{strong.name}, behind the gate: {reason}" for reason in behind]
    count = min(len(values) for values in right.values())
    noise = withstands_noise(evaluation, subject, count)
    reasons += credibility.order_of_attacks(right, levels, clean=clean[:count], noise=noise)
    return reasons + credibility.more_steps_leave_more(against_steps)


def health(evaluation: Evaluation, subject: Subject, clean: Tensor) -> list[str]:
    """What is wrong with the gradient of a defense, on a few images of those that it labels right."""
    images, steps, far_steps = looked_at(subject)
    few = clean.nonzero().flatten()[:images]
    seed, eps = derive_seed(evaluation.recipe.seed, "health"), evaluation.recipe.eps

    def find() -> dict[str, Any]:
        chosen, defended = evaluation.chosen(few), subject.defended
        classes = len(evaluation.bundle.classes)
        reasons = credibility.gradient_health(defended, *chosen, classes=classes, seed=seed, far_steps=far_steps)
        return {"reasons": reasons + credibility.more_steps_help(defended, *chosen, eps=eps, seed=seed, steps=steps)}

    found = evaluation.once({**evaluation.asked(subject), "health": few.tolist(), "steps": [steps, far_steps]}, find)
    reasons: list[str] = found["reasons"]
    return reasons


def looked_at(subject: Subject) -> Looked:
    """How closely `health` looks at a defense."""
    return COSTLY_HEALTH if subject.descends else HEALTH


def work_of_checks(evaluation: Evaluation, subject: Subject) -> dict[str, tuple[int, Work]]:
    """What `doubts` does, if nothing is found: images, and the work for each. One name is one finding."""
    attacked = min(evaluation.planner().effort(subject).images, len(evaluation.data))
    found = {f"noise on {subject.name}": (attacked, Work())}
    strong = evaluation.behind_the_gate(subject)
    for checked in {subject.name: subject, strong.name: strong}.values():
        count, _ = clean_work(evaluation, checked)
        images, steps, far_steps = looked_at(checked)
        looks, answers = credibility.passes(steps, far_steps, is_random=checked.defended.is_random)
        found[f"gradient of {checked.name}"] = (min(images, count), Work(looks=looks, answers=answers))
        if checked is not subject:
            found[clean_answers(checked)] = (count, Work())
    return found


def clean_answers(subject: Subject) -> str:
    """The name, in `work_of_checks`, of what L0 asks a defense too."""
    return f"clean images for {subject.name}"


def withstands_noise(evaluation: Evaluation, subject: Subject, count: int) -> Tensor:
    """Which of the first images a defense labels right when every value moves by eps at random, (count,)."""
    seed, eps = derive_seed(evaluation.recipe.seed, "health"), evaluation.recipe.eps

    def find() -> dict[str, Any]:
        parts = [
            credibility.withstands_noise(subject.defended, images, labels, eps=eps, seed=seed, first=numbers[0])
            for numbers, images, labels in evaluation.batches(count)
        ]
        return {"right": torch.cat(parts).int().tolist()}

    found = evaluation.once({**evaluation.asked(subject), "noise": eps, "images": [0, count]}, find)
    return torch.tensor(found["right"], dtype=torch.bool)
