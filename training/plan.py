"""Which attacks a defense is put through, by level.

| level | the attacker | attacks |
|---|---|---|
| L1 | knows the classifier, not the defense | those of `grey_box.py`, by name |
| L2 | goes around the purifier | BPDA with EOT |
| L3 | goes through everything | PGD with EOT on the exact gradient; Auto-PGD with EOT on two losses |
| L4 | knows what the defense looks at | see `purifier_specific` |
| L5 | has no gradient, or another network's | Square; transfer from other classifiers |
| L6 | does something the defense was not made for | l2, other budgets, moved pixels, a known seed |

Levels L1 to L5 share one threat model, so the worst of them, image by image, is the headline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from models.aid import Aid, AidPurifier
from models.atop import AtopPurifier
from models.bundle import Bundle
from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.gate import GatePurifier
from models.randomness import derive_seed
from models.zeropur import ZeroPurPurifier
from training import grey_box
from training.attacks import by_autoattack, by_foolbox, gradients, unrolled
from training.attacks.looks import Looks, Oracle, SameLook
from training.attacks.pgd import Objective, ascend
from training.attacks.threats import Linf, Threat
from training.budgets import Budget, Effort
from training.subject import Attack, Level, Subject, Work

RELATIVE_STEP = 0.007 / (8 / 255)
"""Step of our attacks as a share of their budget: that of Lee & Kim (2023) at 8/255."""
SMOOTH_PASSES = 6
"""A gradient through unrolled steps, and an answer, cost about as much as so many purifications."""
DLR_CLASSES = 3
"""The difference-of-logits ratio is not defined for fewer."""
TRANSFER_STEPS = 40


Objectives = Callable[[Tensor, Looks], Objective]
"""Labels and looks to what `ascend` climbs."""


@dataclass(frozen=True)
class Planner:
    """Everything that attacks on one bundle share."""

    classifier: Classifier
    budget: Budget
    eps: float
    seed: int
    transfer: Mapping[str, Bundle]
    """Others, by `name@version`, whose classifiers' adversarial images are tried here too."""
    classes: int
    aid: Aid | None = None
    """The bundle's discriminator, for attacks on it and the classifier alone."""

    def effort(self, subject: Subject) -> Effort:
        """What the attacks on this defense may spend.

        For a defense that descends and draws too it is the effort for descending ones, with the draws of the others,
        and with BPDA, which is the exact gradient of a purifier of signed steps alone.
        """
        one_pass, descending = self.budget.one_pass, self.budget.descending
        if not subject.descends:
            return one_pass
        if not subject.defended.is_random:
            return descending
        draws = {name: getattr(one_pass, name) for name in ("bpda_draws", "full_draws", "apgd_draws")}
        return descending.model_copy(update={**draws, "bpda_steps": descending.full_steps})

    def grey_box(self, subject: Subject) -> list[Attack]:
        """L1: attacks on the classifier alone."""
        budget = self.budget
        count = budget.costly_images if subject.descends else budget.grey_box_images
        return [self.named(name, count) for name in budget.grey_box]

    def named(self, name: str, count: int) -> Attack:
        """One grey-box attack by its name, on `count` images."""
        attack = grey_box.attack(name, self.classifier, eps=self.eps, seed=self.seed)
        if name == "autoattack":
            count = min(count, self.budget.autoattack_images)
        return Attack(
            name, "L1", attack.settings, count, attack.run, attack.threat, Work(bare=attack.passes), shared=True
        )

    def adaptive(self, subject: Subject) -> list[Attack]:
        """L2 to L5: attacks on the defense."""
        effort, defended = self.effort(subject), subject.defended
        found = list[Attack]()
        if subject.purifiers:
            found += self.climbs(
                "bpda",
                "L2",
                effort,
                effort.bpda_steps,
                lambda labels, looks: gradients.around(defended, labels, looks, draws=effort.bpda_draws),
                Work(bare=defended.votes, answers=1),
                draws=self.draws(subject, effort.bpda_draws),
            )
        found += self.climbs(
            "full",
            "L3",
            effort,
            effort.full_steps,
            lambda labels, looks: gradients.through(defended, labels, looks, draws=effort.full_draws),
            Work(looks=1),
            draws=self.draws(subject, effort.full_draws),
        )
        if effort.apgd_steps:
            found.append(self.apgd(subject, "ce"))
        if effort.apgd_steps and self.classes >= DLR_CLASSES:
            found.append(self.apgd(subject, "dlr"))
        found += self.purifier_specific(subject)
        found += [self.square(subject)] if effort.square_queries else []
        found += [self.transferred(name, other, effort) for name, other in self.transfer.items()]
        return found

    def draws(self, subject: Subject, wanted: int) -> int:
        """How many looks a gradient takes the mean of; one where nothing is drawn."""
        return wanted if subject.defended.is_random else 1

    def climbs(
        self,
        name: str,
        level: Level,
        effort: Effort,
        steps: int,
        objective: Objectives,
        look: Work,
        *,
        threat: Threat | None = None,
        looks: type[Looks] = Looks,
        draws: int = 1,
        **settings: object,
    ) -> list[Attack]:
        """Projected ascent from the image itself; nothing for no steps. `look` is the work of one gradient.

        Few steps are larger, so that together they could cross the ball. It keeps the iterate of the highest value, as
        Auto-PGD does, which takes one more look.
        """
        threat = threat or Linf(self.eps)
        step_size = max(RELATIVE_STEP, min(1.0, 2 / max(1, steps))) * threat.eps

        def seen(numbers: Sequence[int]) -> Looks:
            return looks(derive_seed(self.seed, "attack", name), numbers)

        def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
            climbed = objective(labels, seen(numbers))
            return ascend(climbed, images, images, threat, steps=steps, step_size=step_size, keep="highest")

        times = (steps + 1) * draws
        known = {"steps": steps, "step_size": step_size, "eps": threat.eps, "draws": draws, "keep": "highest"}
        known |= settings
        work = Work(look.bare * times, look.looks * times, 1 + (look.answers * times if not look.looks else 0))
        attack = Attack(name, level, known, effort.images, run, threat, work)
        return [attack] if steps else []

    def apgd(self, subject: Subject, loss: Literal["ce", "dlr"]) -> Attack:
        """Auto-PGD on the whole defense, the two attacks of AutoAttack `rand`."""
        effort, threat = self.effort(subject), Linf(self.eps)
        draws = self.draws(subject, effort.apgd_draws)

        def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
            seed = derive_seed(self.seed, "apgd", loss, numbers[0])
            oracle = Oracle(subject.defended, seed)
            steps = effort.apgd_steps
            return by_autoattack.apgd(
                oracle,
                images,
                labels,
                threat,
                loss=loss,
                steps=steps,
                draws=draws,
                seed=seed % 2**31,
                is_random=subject.defended.is_random,
            )

        keep = by_autoattack.keeps(subject.defended.is_random)
        settings = {"steps": effort.apgd_steps, "draws": draws, "keep": keep}
        work = Work(looks=effort.apgd_steps * draws)
        return Attack(f"apgd_{loss}", "L3", settings, effort.images, run, threat, work)

    def purifier_specific(self, subject: Subject) -> list[Attack]:
        """L4: what hurts each kind of purifier in particular."""
        effort, defended = self.effort(subject), subject.defended
        found = list[Attack]()
        if any(isinstance(part, AtopPurifier) for purifier in subject.purifiers for part in purifier.modules()):
            found += self.climbs(
                "fixed_look",
                "L4",
                effort,
                effort.full_steps,
                lambda labels, looks: gradients.through(defended, labels, looks, draws=1),
                Work(looks=1),
                looks=SameLook,
            )
        chain = subject.purifiers
        if len(chain) == 1 and isinstance(chain[0], GatePurifier):  # `auto` always stands alone
            found += self.past(chain[0], effort, defended.votes)
            chain = list(chain[0].strong)  # an image may also stay a suspect, and beat what suspects meet
        for purifier in chain:
            for weight in effort.aware_weights:
                found += self.aware(purifier, weight, effort)
        if len(chain) == 1 and isinstance(chain[0], AidPurifier | ZeroPurPurifier):
            found += self.unrolled(chain[0], effort)
        return found

    def aware(self, purifier: nn.Module, weight: float, effort: Effort) -> list[Attack]:
        """Attacks that fool the classifier while the defense sees nothing to do."""
        steps = effort.aware_steps
        if isinstance(purifier, AidPurifier):
            aid = purifier.aid
            found = self.climbs(
                f"aware_aid_{weight:g}",
                "L4",
                effort,
                steps,
                lambda labels, looks: gradients.while_natural(aid, labels, weight=weight),
                Work(bare=2, answers=0),
            )
            return for_all_that_have(purifier, found)
        if isinstance(purifier, ZeroPurPurifier):
            preset = purifier.preset
            found = self.climbs(
                f"aware_zeropur_{weight:g}",
                "L4",
                effort,
                steps,
                lambda labels, looks: gradients.while_aligned(self.classifier, preset, labels, weight=weight),
                Work(bare=3, answers=0),
            )
            return for_all_that_have(purifier, found)
        return []

    def past(self, gate: GatePurifier, effort: Effort, votes: int) -> list[Attack]:
        """An image that AID finds natural passes the gate, and meets the cheap chain alone."""
        passed = DefendedClassifier(self.classifier, list(gate.cheap), votes=votes)  # type: ignore[arg-type]
        draws = effort.full_draws if passed.is_random else 1
        return self.climbs(
            "past_gate",
            "L4",
            effort,
            effort.aware_steps,
            lambda labels, looks: gradients.past_the_gate(gate, passed, labels, looks, draws=draws),
            Work(bare=1 + passed.votes, answers=0),
            draws=draws,
        )

    def smooth(self, purifier: unrolled.Descending, sharpness: float, effort: Effort) -> list[Attack]:
        """Through every step of the purifier, with tanh in the place of the sign."""
        return self.climbs(
            f"smooth_steps_{sharpness:g}",
            "L4",
            effort,
            effort.smooth_steps,
            lambda labels, looks: unrolled.through_smooth_steps(purifier, self.classifier, labels, sharpness=sharpness),
            Work(answers=SMOOTH_PASSES),
            sharpness=sharpness,
        )

    def unrolled(self, purifier: unrolled.Descending, effort: Effort) -> list[Attack]:
        """Attacks on the steps of a purifier that descends; none where its preset cannot be unrolled."""
        if not unrolled.can_be_unrolled(purifier):
            return []
        over = self.climbs(
            "iterates",
            "L4",
            effort,
            effort.iterate_steps,
            lambda labels, looks: unrolled.over_iterates(purifier, self.classifier, labels),
            Work(answers=2),
        )
        smooth = [
            attack for sharpness in effort.smooth_sharpness for attack in self.smooth(purifier, sharpness, effort)
        ]
        return for_all_that_have(purifier, over + smooth)

    def square(self, subject: Subject) -> Attack:
        """L5: random search on the whole defense; a random one answers a query with the mean of several looks."""
        effort, threat, defended = self.effort(subject), Linf(self.eps), subject.defended
        looks = self.draws(subject, effort.apgd_draws)

        def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
            seed = derive_seed(self.seed, "square", numbers[0])
            oracle, queries = Oracle(defended, seed, looks), effort.square_queries
            return by_autoattack.square(
                oracle, images, labels, threat, queries=queries, seed=seed % 2**31, is_random=defended.is_random
            )

        work = Work(answers=1 + effort.square_queries * looks)
        settings = {"queries": effort.square_queries, "looks": looks, "goes_on": defended.is_random}
        return Attack("square", "L5", settings, effort.images, run, threat, work)

    def transferred(self, name: str, other: Bundle, effort: Effort) -> Attack:
        """L5: PGD images of another bundle's classifier."""
        threat, classifier = Linf(self.eps), other.classifier

        def run(images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
            torch.manual_seed(derive_seed(self.seed, "transfer", numbers[0]))
            steps, step_size = TRANSFER_STEPS, self.eps / 4
            return by_foolbox.foolbox_pgd(classifier, images, labels, eps=self.eps, steps=steps, step_size=step_size)

        weights, spec = other.manifest.weights.get("classifier.safetensors", ""), other.manifest.classifier
        settings = {"steps": TRANSFER_STEPS, "weights": weights, **spec.model_dump(mode="json")}
        work = Work(bare=TRANSFER_STEPS)
        return Attack(f"transfer_{name}", "L5", settings, effort.images, run, threat, work, shared=True)


def for_all_that_have(purifier: unrolled.Descending, attacks: Sequence[Attack]) -> list[Attack]:
    """The attacks on this purifier alone, whose images serve every defense that it stands in."""
    on = {"on": purifier.preset.model_dump(mode="json")}
    return [replace(attack, settings={**attack.settings, **on}, shared=True) for attack in attacks]
