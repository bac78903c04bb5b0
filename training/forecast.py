"""What an evaluation will cost here, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from models.packed import MAX_PACKED_BATCH
from training.attacks.gradients import through
from training.attacks.looks import Looks
from training.doubts import clean_answers, work_of_checks
from training.evaluation import Evaluation, clean_work, fitted, has_worst_case, key_of, planned
from training.subject import GROUPS, Subject, Work
from training.unseen import curve_points


def forecast(evaluation: Evaluation, subjects: Sequence[Subject]) -> str:
    """What every level of every defense will cost, in minutes on this machine, as a table; from a few timed passes.

    What an earlier run found is counted too: it will come at once. The last column but one are the checks of whether a
    worst case is credible; those of `auto` at most, since clean images pass its gate.
    """
    levels = ["L0", *GROUPS, "checks"]
    lines = [f"{'minutes, about':<18}" + "".join(f"{level:>8}" for level in levels) + f"{'all':>8}"]
    total, made = 0.0, set[str]()
    bare = unit_times(evaluation, subjects[0]).gradient
    for subject in subjects:
        strong, seconds = evaluation.behind_the_gate(subject), dict.fromkeys(levels, 0.0)
        times = unit_times(evaluation, strong)
        clean = times if strong is subject else unit_times(evaluation, subject)
        count, draws = clean_work(evaluation, subject)
        seconds["L0"] = count * draws * clean.answer
        curved = {} if subject.name in evaluation.recipe.grey_box_only else curve_points(evaluation.planner(), subject)
        points = [fitted(attack, len(evaluation.data)) for axis in curved.values() for _, attack in axis]
        planned_attacks = planned(evaluation, subject)
        attacks = {str(key_of(attack)): attack for attack in (*planned_attacks, *points)}
        for known, attack in attacks.items():
            work = Work(answers=1) if attack.shared and known in made else attack.work  # the verdict alone
            own = work.bare * bare + work.looks * times.gradient + work.answers * times.answer
            seconds[attack.level] += attack.images * own
        made |= attacks.keys()
        checks = work_of_checks(evaluation, subject) if has_worst_case(planned_attacks) else {}
        for check in checks.keys() - made:
            images, work = checks[check]
            seconds["checks"] += images * (work.looks * times.gradient + work.answers * times.answer)
        made |= checks.keys() | {clean_answers(subject)}
        total += sum(seconds.values())
        cells = [*seconds.values(), sum(seconds.values())]
        lines.append(f"{subject.name:<18}" + "".join(f"{value / 60:>8.1f}" for value in cells))
    return "\n".join([*lines, f"In all about {total / 60:.0f} minutes."])


@dataclass(frozen=True)
class UnitTimes:
    """Seconds per image."""

    answer: float
    gradient: float


def unit_times(evaluation: Evaluation, subject: Subject) -> UnitTimes:
    """One answer and one gradient of a defense, per image of a batch as large as its attacks will see.

    Both are made for a few images before, not timed: the first ones of a process load what they need.
    """
    size = min(evaluation.recipe.batch_size, evaluation.planner().effort(subject).images, len(evaluation.data))
    _, images, labels = next(evaluation.batches(size))

    def timed(count: int) -> UnitTimes:
        looks, some_images, some_labels = Looks(0, range(count)), images[:count], labels[:count]
        climbed = through(subject.defended, some_labels, looks, draws=1)
        started = time.perf_counter()
        evaluation.right(subject, some_images, some_labels, looks.next())
        answered = time.perf_counter()
        climbed(some_images)
        return UnitTimes((answered - started) / count, (time.perf_counter() - answered) / count)

    timed(min(size, MAX_PACKED_BATCH + 1))  # computed as the whole batch is
    return timed(size)
