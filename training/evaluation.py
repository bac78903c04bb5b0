"""A bundle, the images it is measured on, and what was found of it: how one defense fares against one attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models import Bundle
from models.manifest import AutoPreset
from models.randomness import derive_seed
from training.attacks.threats import assert_in_budget
from training.config import EvaluateRecipe, RecipeError
from training.data import ImageSet, in_batches, to_float
from training.plan import Planner
from training.progress import Progress
from training.provenance import git_commit
from training.subject import Attack, Subject
from training.unseen import requested, unseen


@dataclass(frozen=True)
class Evaluation:
    """A bundle, the images it is measured on, and what was found so far."""

    recipe: EvaluateRecipe
    bundle: Bundle
    data: ImageSet
    """The test images, shuffled by the recipe's seed."""
    progress: Progress
    transfer: Mapping[str, Bundle]
    data_sha256: str = ""
    """Of the test split as it is, so that two reports can tell whether they speak of the same images."""
    content_sha256: str = ""
    """Of the bundle as it is on disk, without the variants that a recipe adds."""
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The findings that the report is made of, by their keys, whenever they were made."""
    spent_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """By defense and attack, how long it took to find what withstood. Where several defenses are given the same images,
    the first one's has what it took to make them."""
    commit: str = field(default_factory=git_commit)

    @property
    def device(self) -> torch.device:
        """Where the bundle is loaded."""
        return self.bundle.classifier.normalize.mean.device

    @cached_property
    def identity(self) -> dict[str, object]:
        """What every finding depends on."""
        return {
            "weights": self.bundle.manifest.weights,
            "classifier": self.bundle.manifest.classifier.model_dump(mode="json"),
            "data": self.data.fingerprint(),
            "seed": self.recipe.seed,
            "eps": self.recipe.eps,
            "batch_size": self.recipe.batch_size,
        }

    def chain(self, defense: str) -> dict[str, object]:
        """What the findings of a defense depend on beside: every step with its settings, and those behind `auto`."""
        manifest = self.bundle.manifest
        steps = list[object]()
        for name, preset in manifest.chain(defense):
            settings = manifest.defenses.offered()[name].presets[preset]
            parts = (settings.cheap, settings.strong) if isinstance(settings, AutoPreset) else ()
            behind = [self.chain(part) for part in parts]
            steps.append([name, settings.model_dump(mode="json"), behind])
        return {"defense": steps}

    def asked(self, subject: Subject) -> dict[str, object]:
        """The same for a defense as this evaluation asks it: of how many votes it takes the mean, if of several."""
        votes = subject.defended.votes
        return {**self.chain(subject.name), **({"votes": votes} if votes > 1 else {})}

    def subjects(self) -> list[Subject]:
        """The bare classifier, then the defenses. Raises UnknownDefense for one that the bundle does not offer."""
        manifest = self.bundle.manifest
        named = self.recipe.defenses or tuple(manifest.defenses.offered())
        names = dict.fromkeys(["none", *named, *self.recipe.grey_box_only])
        return [Subject(name, self.bundle.defended(name, votes=self.recipe.votes)) for name in names]

    def planner(self) -> Planner:
        """Who decides which attacks are run."""
        recipe = self.recipe
        bundle, classes = self.bundle, len(self.bundle.classes)
        return Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, self.transfer, classes, bundle.aid)

    def behind_the_gate(self, subject: Subject) -> Subject:
        """For `auto` the strong chain, which most attacked images take; any other defense is itself."""
        manifest = self.bundle.manifest
        for name, preset in manifest.chain(subject.name):
            settings = manifest.defenses.offered()[name].presets[preset]
            if isinstance(settings, AutoPreset):
                return Subject(settings.strong, self.bundle.defended(settings.strong, votes=self.recipe.votes))
        return subject

    def once(self, depends_on: Mapping[str, object], find: Callable[[], Mapping[str, object]]) -> dict[str, Any]:
        """A finding: what an earlier run kept, or `find` now, timed and kept. All depend on `identity` too."""
        of = {**self.identity, **depends_on}
        found = self.progress.find(of)
        if found is None:
            began = time.monotonic()
            finding = dict(find())
            finding |= {"wall_s": round(time.monotonic() - began, 3), "commit": self.commit}
            found = self.progress.add(of, finding)
        self.used[found["key"]] = found
        return found

    # --- one image after the other

    def batches(self, count: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers, images and labels of the first `count` images."""
        chosen = head(self.data, count)
        start = 0
        for images, labels in in_batches(chosen, self.recipe.batch_size, self.device):
            yield list(range(start, start + len(labels))), images, labels
            start += len(labels)

    def chosen(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels by their numbers."""
        few = self.data.subset(numbers)
        return to_float(few.images, self.device), few.labels.to(self.device)

    def right(self, subject: Subject, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Which images the defense labels right in one answer, (N,)."""
        with torch.no_grad():
            return (subject.defended.answer(images, seeds).argmax(1) == labels).cpu()

    def verdict_seeds(self, numbers: Sequence[int], what: object) -> list[int]:
        """Randomness that no attack has seen."""
        return [derive_seed(self.recipe.seed, "verdict", str(what), number) for number in numbers]

    def withstood(self, subject: Subject, attack: Attack, bar: tqdm[Any]) -> Tensor:
        """Which of the attack's images the defense still labels right, (attack.images,); found once, then known."""

        def find(numbers: list[int], images: Tensor, labels: Tensor) -> dict[str, Any]:
            adversarial = self.attacked(attack, images, labels, numbers)
            unseen = self.verdict_seeds(numbers, attack.name)
            seeds = attack.known_seeds(numbers) if attack.known_seeds else unseen
            return {"right": self.right(subject, adversarial, labels, seeds).int().tolist()}

        found = list[dict[str, Any]]()
        for batch in self.batches(attack.images):
            numbers = batch[0]
            of = {**self.asked(subject), **key_of(attack), "images": [numbers[0], len(numbers)]}
            found.append(self.once(of, partial(find, *batch)))
            bar.update(len(numbers))
        self.spent_s[subject.name, attack.name] = sum(each["wall_s"] for each in found)
        return torch.cat([torch.tensor(each["right"], dtype=torch.bool) for each in found])

    def attacked(self, attack: Attack, images: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        """The adversarial images. Raises AssertionError if the attack leaves its budget."""
        of = {**self.identity, **key_of(attack), "images": [numbers[0], len(numbers)]}
        kept = self.progress.images(of) if attack.shared else None
        if kept is not None:
            return kept.to(self.device)
        adversarial = attack.run(images, labels, numbers)
        if attack.threat is not None:
            assert_in_budget(adversarial, images, attack.threat, attack.name)
        if attack.shared:
            self.progress.keep_images(of, adversarial.cpu())
        return adversarial

    def clean(self, subject: Subject, count: int, draws: int) -> Tensor:
        """Which clean images are labeled right, per draw, (draws, count)."""

        def find(draw: int, numbers: list[int], images: Tensor, labels: Tensor) -> dict[str, Any]:
            return {"right": self.right(subject, images, labels, self.verdict_seeds(numbers, draw)).int().tolist()}

        rows = list[Tensor]()
        for draw in range(draws):
            parts = list[Tensor]()
            for batch in self.batches(count):
                of = {**self.asked(subject), "clean": draw, "images": [batch[0][0], len(batch[0])]}
                found = self.once(of, partial(find, draw, *batch))
                parts.append(torch.tensor(found["right"], dtype=torch.bool))
            rows.append(torch.cat(parts))
        return torch.stack(rows)


def key_of(attack: Attack) -> dict[str, object]:
    """What an attack's findings depend on, beside the bundle and the images."""
    return {"attack": attack.name, "settings": dict(attack.settings)}


def head(data: ImageSet, count: int) -> ImageSet:
    """The first `count` images, or all where there are fewer."""
    return data.subset(torch.arange(min(count, len(data))))


def every_level(planner: Planner, subject: Subject) -> list[Attack]:
    """L1 to L6. Raises AssertionError if two attacks have one name, which would be one finding."""
    found = [*planner.grey_box(subject), *planner.adaptive(subject), *unseen(planner, subject)]
    assert len({attack.name for attack in found}) == len(found)
    return found


def planned(evaluation: Evaluation, subject: Subject) -> list[Attack]:
    """Every attack on a defense, on no more images than there are."""
    planner = evaluation.planner()
    only_grey = subject.name in evaluation.recipe.grey_box_only
    attacks = planner.grey_box(subject) if only_grey else every_level(planner, subject)
    known = {attack.name for attack in attacks}
    further = [requested(planner, subject, wanted) for wanted in evaluation.recipe.further]
    if both := known & {attack.name for attack in further}:
        raise RecipeError(f"{', '.join(sorted(both))}: in `further`, and an attack of the budget")
    return [fitted(attack, len(evaluation.data)) for attack in (*attacks, *further)]


def has_worst_case(attacks: Sequence[Attack]) -> bool:
    """Whether there is more than L1 among the attacks in the budget: grey-box ones alone make no worst case."""
    return any(attack.level not in ("L1", "L6") for attack in attacks)


def clean_work(evaluation: Evaluation, subject: Subject) -> tuple[int, int]:
    """How many clean images a defense is asked about, and how many times each.

    `auto` is asked about as many as a defense of one pass: few of them cost it more than a look at the gate.
    """
    budget, gated = evaluation.recipe.effort, evaluation.behind_the_gate(subject) is not subject
    count = budget.costly_images if subject.descends and not gated else budget.clean_images
    return min(count, len(evaluation.data)), budget.clean_draws if subject.defended.is_random else 1


def fitted(attack: Attack, available: int) -> Attack:
    """The attack on as many images as there are."""
    return replace(attack, images=min(attack.images, available))
