"""`evaluate`: what a bundle and its defenses are worth, clean and attacked, into its report.json.

The headline is the worst case: an image counts as right only if it withstood every attack of levels L1 to L5, and the
clean image is right too. Beside it stands the same for the bare classifier. Grey-box numbers (L1), which the papers
report, flatter every purifier: their attacker does not know that it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models import Bundle, load_bundle, write_report
from models.files import replace_text
from models.manifest import AutoPreset
from models.randomness import derive_seed, generator_for
from training import credibility
from training.attacks.gradients import through
from training.attacks.looks import Looks
from training.attacks.threats import Linf, assert_in_budget
from training.config import EvaluateRecipe
from training.data import DataError, ImageSet, in_batches, load_split
from training.pictures import Picture, pictures
from training.plan import GROUPS, Attack, Planner, Subject
from training.progress import Progress
from training.provenance import git_commit, hardware, library_versions
from training.report import page
from training.statistics import against_static, binomial, detection

COST_BATCH = 32
COST_REPEATS = 5
HEALTH_IMAGES = 16
PICTURES = 6
AUTOATTACK_CLASSES = 4
COSTLY_HEALTH_IMAGES = 8
HEALTH_STEPS = 8


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
    used: list[dict[str, Any]] = field(default_factory=list)
    """The findings that the report is made of, whenever they were made."""
    commit: str = field(default_factory=git_commit)

    @property
    def device(self) -> torch.device:
        """Where the bundle is loaded."""
        return self.bundle.classifier.normalize.mean.device

    @cached_property
    def identity(self) -> dict[str, object]:
        """What every finding depends on."""
        return {
            "weights": weights_of(self.bundle),
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

    def subjects(self) -> list[Subject]:
        """The bare classifier, then the defenses. Raises UnknownDefense for one that the bundle does not offer."""
        manifest = self.bundle.manifest
        named = self.recipe.defenses or tuple(manifest.defenses.offered())
        names = dict.fromkeys(["none", *named, *self.recipe.grey_box_only])
        return [Subject(name, self.bundle.defended(name)) for name in names]

    def planner(self) -> Planner:
        """Who decides which attacks are run."""
        recipe = self.recipe
        classes = len(self.bundle.classes)
        return Planner(self.bundle.classifier, recipe.effort, recipe.eps, recipe.seed, self.transfer, classes)

    # --- one image after the other

    def batches(self, count: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers, images and labels of the first `count` images."""
        chosen = head(self.data, count)
        start = 0
        for images, labels in in_batches(chosen, self.recipe.batch_size, self.device):
            yield list(range(start, start + len(labels))), images, labels
            start += len(labels)

    def right(self, subject: Subject, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Which images the defense labels right in one look, (N,)."""
        with torch.no_grad():
            return (subject.defended.vote(images, seeds, 0).argmax(1) == labels).cpu()

    def verdict_seeds(self, numbers: Sequence[int], what: object) -> list[int]:
        """Randomness that no attack has seen."""
        return [derive_seed(self.recipe.seed, "verdict", str(what), number) for number in numbers]

    def withstood(self, subject: Subject, attack: Attack, bar: tqdm[Any]) -> Tensor:
        """Which of the attack's images the defense still labels right, (attack.images,); found once, then known."""
        parts = list[Tensor]()
        for numbers, images, labels in self.batches(attack.images):
            of = {**self.identity, **self.chain(subject.name), **key_of(attack), "images": [numbers[0], len(numbers)]}
            found = self.progress.find(of)
            if found is None:
                began = time.monotonic()
                adversarial = self.attacked(attack, images, labels, numbers)
                unseen = self.verdict_seeds(numbers, attack.name)
                seeds = attack.known_seeds(numbers) if attack.known_seeds else unseen
                right = self.right(subject, adversarial, labels, seeds)
                wall_s = round(time.monotonic() - began, 3)
                found = {"right": right.int().tolist(), "wall_s": wall_s, "commit": self.commit}
                self.progress.add(of, found)
            self.used.append(found)
            parts.append(torch.tensor(found["right"], dtype=torch.bool))
            bar.update(len(numbers))
        return torch.cat(parts)

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
        rows = list[Tensor]()
        for draw in range(draws):
            parts = list[Tensor]()
            for numbers, images, labels in self.batches(count):
                of = {**self.identity, **self.chain(subject.name), "clean": draw, "images": [numbers[0], len(numbers)]}
                found = self.progress.find(of)
                if found is None:
                    right = self.right(subject, images, labels, self.verdict_seeds(numbers, draw))
                    found = {"right": right.int().tolist(), "wall_s": 0.0, "commit": self.commit}
                    self.progress.add(of, found)
                self.used.append(found)
                parts.append(torch.tensor(found["right"], dtype=torch.bool))
            rows.append(torch.cat(parts))
        return torch.stack(rows)


def key_of(attack: Attack) -> dict[str, object]:
    """What an attack's findings depend on, beside the bundle and the images."""
    return {"attack": attack.name, "settings": dict(attack.settings)}


def weights_of(bundle: Bundle) -> dict[str, str]:
    """The sha256 of every file of weights."""
    return {name: sha256 for name, sha256 in bundle.manifest.files.items() if name.endswith(".safetensors")}


def head(data: ImageSet, count: int) -> ImageSet:
    """The first `count` images, or all where there are fewer."""
    return data.subset(torch.arange(min(count, len(data))))


# --- one entry of the report


@dataclass(frozen=True)
class Entry:
    """One defense, measured: its line in the report, and which images withstood everything."""

    report: dict[str, Any]
    survived: Tensor


def measure(evaluation: Evaluation, subject: Subject) -> Entry:
    """Run every attack of the plan on one defense."""
    attacks = planned(evaluation, subject)
    adaptive = any(attack.level != "L1" for attack in attacks)
    count, draws = clean_work(evaluation, subject)
    clean = evaluation.clean(subject, count, draws)
    right = dict[str, Tensor]()
    for attack in attacks:
        with tqdm(total=attack.images, desc=f"{subject.name} {attack.level} {attack.name}", unit="image") as bar:
            right[attack.name] = evaluation.withstood(subject, attack, bar)

    levels = {attack.name: attack.level for attack in attacks}
    same = Linf(evaluation.recipe.eps)
    within = [attack.name for attack in attacks if attack.level != "L6" and attack.threat == same]
    compared = min([count, *(len(right[name]) for name in within)])
    survived = torch.stack([clean[0][:compared], *(right[name][:compared] for name in within)]).all(0)
    reasons = [credibility.NOT_ADAPTIVE]
    if adaptive:
        reasons = doubts(evaluation, subject, {name: right[name] for name in within}, levels, clean[0], compared)
    cells: dict[str, dict[str, Any]] = {group: {} for group in ("grey_box", "adaptive", "unseen")}
    for attack in attacks:
        settings = {"settings": dict(attack.settings)} if attack.settings else {}
        cells[GROUPS[attack.level]][attack.name] = {
            **binomial(float(right[attack.name].sum()), len(right[attack.name])),
            "level": attack.level,
            **settings,
        }
    report = {
        "standard": binomial(float(clean.sum()) / draws, count),
        **cells,
        "curves": curves(evaluation, subject),
        "worst_case": {**binomial(float(survived.sum()), compared), "over": ["clean", *within]} if adaptive else None,
        "credible": not reasons,
        "reasons": reasons,
        "cost": round(cost(evaluation.bundle, subject.name), 2),
    }
    return Entry(report, survived)


def curves(evaluation: Evaluation, subject: Subject) -> dict[str, list[dict[str, Any]]]:
    """Accuracy against eps and against steps of the full-gradient attack."""
    found: dict[str, list[dict[str, Any]]] = {}
    if subject.name in evaluation.recipe.grey_box_only:
        return found
    for axis, points in evaluation.planner().curves(subject).items():
        found[axis] = []
        with tqdm(total=len(points), desc=f"{subject.name} accuracy against {axis}", unit="point") as bar:
            for value, attack in points:
                with tqdm(disable=True) as silent:
                    right = evaluation.withstood(subject, fitted(attack, len(evaluation.data)), silent)
                found[axis].append({axis: value, **binomial(float(right.sum()), len(right))})
                bar.update()
    return found


def planned(evaluation: Evaluation, subject: Subject) -> list[Attack]:
    """Every attack on a defense, on no more images than there are."""
    planner = evaluation.planner()
    only_grey = subject.name in evaluation.recipe.grey_box_only
    attacks = planner.grey_box(subject) if only_grey else planner.attacks(subject)
    return [fitted(attack, len(evaluation.data)) for attack in attacks]


def clean_work(evaluation: Evaluation, subject: Subject) -> tuple[int, int]:
    """How many clean images a defense is asked about, and how many times each."""
    budget = evaluation.recipe.effort
    count = budget.costly_images if subject.descends else budget.clean_images
    return min(count, len(evaluation.data)), budget.clean_draws if subject.defended.is_random else 1


def fitted(attack: Attack, available: int) -> Attack:
    """The attack on as many images as there are."""
    return replace(attack, images=min(attack.images, available))


def doubts(
    evaluation: Evaluation,
    subject: Subject,
    right: Mapping[str, Tensor],
    levels: Mapping[str, str],
    clean: Tensor,
    count: int,
) -> list[str]:
    """Why a robust accuracy is not to be believed; found once, then known."""
    of = {
        **evaluation.identity,
        **evaluation.chain(subject.name),
        "doubts": {name: [levels[name], values[:count].int().tolist()] for name, values in right.items()},
        "clean": clean[:count].int().tolist(),
    }
    found = evaluation.progress.find(of)
    if found is None:
        _, images, labels = next(evaluation.batches(count))
        seed = derive_seed(evaluation.recipe.seed, "health")
        few_enough = COSTLY_HEALTH_IMAGES if subject.descends else HEALTH_IMAGES
        correct = clean[: len(labels)].nonzero().flatten()[:few_enough].to(images.device)
        reasons = list[str]()
        if len(correct):
            few = images[correct], labels[correct]
            classes = len(evaluation.bundle.classes)
            reasons += credibility.gradient_health(subject.defended, *few, classes=classes, seed=seed)
            eps = evaluation.recipe.eps
            reasons += credibility.more_steps_help(subject.defended, *few, eps=eps, seed=seed, steps=HEALTH_STEPS)
        noise = [
            credibility.withstands_noise(
                subject.defended, some, own, eps=evaluation.recipe.eps, seed=seed, first=numbers[0]
            )
            for numbers, some, own in evaluation.batches(count)
        ]
        same = {name: values[:count] for name, values in right.items()}
        reasons += credibility.order_of_attacks(same, levels, clean=clean[:count], noise=torch.cat(noise))
        found = {"reasons": reasons}
        evaluation.progress.add(of, found)
    reasons_found: list[str] = found["reasons"]
    return reasons_found


def cost(bundle: Bundle, defense: str) -> float:
    """Time of defended over undefended inference for a batch of 32, the best of five runs of each, in turn."""
    device = bundle.classifier.normalize.mean.device
    images = torch.rand(COST_BATCH, 3, *bundle.input_size, generator=generator_for(0, "cost")).to(device)
    best = {"none": float("inf"), defense: float("inf")}
    for _ in range(COST_REPEATS):
        for name in best:
            began = time.perf_counter()
            bundle.probabilities(name, images, seed=0).cpu()
            best[name] = min(best[name], time.perf_counter() - began)
    return best[defense] / best["none"]


# --- before it starts


def forecast(evaluation: Evaluation, subjects: Sequence[Subject]) -> str:
    """What every level of every defense will cost, in minutes on this machine, as a table; from a few timed passes.

    What an earlier run found is counted too: it will come at once.
    """
    levels = ["L0", *GROUPS]
    lines = [f"{'minutes, about':<18}" + "".join(f"{level:>8}" for level in levels) + f"{'all':>8}"]
    total = 0.0
    bare = unit_times(evaluation, subjects[0]).gradient
    for subject in subjects:
        times, seconds = unit_times(evaluation, subject), dict.fromkeys(levels, 0.0)
        count, draws = clean_work(evaluation, subject)
        seconds["L0"] = count * draws * times.answer
        curved = {} if subject.name in evaluation.recipe.grey_box_only else evaluation.planner().curves(subject)
        points = [attack for axis in curved.values() for _, attack in axis]
        for attack in [*planned(evaluation, subject), *(fitted(attack, len(evaluation.data)) for attack in points)]:
            work = attack.work
            own = 0.0 if attack.shared and subject.purifiers else work.bare * bare
            own += work.looks * times.gradient + work.answers * times.answer
            seconds[attack.level] += attack.images * own
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
    """One answer and one gradient of a defense, per image of a batch as large as its attacks will see."""
    size = min(evaluation.recipe.batch_size, evaluation.planner().effort(subject).images, len(evaluation.data))
    _, images, labels = next(evaluation.batches(size))
    looks = Looks(0, range(size))

    def timed(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) / size

    answer = timed(lambda: evaluation.right(subject, images, labels, looks.next()))
    climbed = through(subject.defended, labels, looks, draws=1)
    return UnitTimes(answer, timed(lambda: climbed(images)))


# --- detection


def aid_scores(evaluation: Evaluation) -> dict[str, Tensor]:
    """The AID scores of the clean images and of those of every grey-box attack; nothing without an AID."""
    bundle = evaluation.bundle
    if bundle.aid is None:
        return {}
    grey_box = evaluation.planner().grey_box(Subject("none", bundle.defended("none")))
    scores: dict[str, Tensor] = {}
    for attack in (None, *(fitted(attack, len(evaluation.data)) for attack in grey_box)):
        count = evaluation.recipe.effort.grey_box_images if attack is None else attack.images
        parts = list[Tensor]()
        for numbers, images, labels in evaluation.batches(count):
            seen = images if attack is None else evaluation.attacked(attack, images, labels, numbers)
            parts.append(bundle.aid_score(seen).cpu())
        scores["clean" if attack is None else attack.name] = torch.cat(parts)
    return scores


# --- the whole


def evaluate(
    recipe: EvaluateRecipe, directory: Path, device: torch.device, runs: Path, *, keep_report: bool = False
) -> dict[str, Any]:
    """Measure a bundle by a recipe and write the report into it, unless `keep_report`; returns the report.

    What was found is kept under `<runs>/evaluations/`, beside a copy of the report, and is not measured again.

    Raises BundleError for a bundle that cannot be loaded, UnknownDefense for a defense that it does not offer, and
    DataError for data of other classes or another size than the bundle's.
    """
    started = time.monotonic()
    evaluation = prepare(recipe, directory, device, runs)
    subjects = evaluation.subjects()
    print(forecast(evaluation, subjects), flush=True)
    entries = {subject.name: measure(evaluation, subject) for subject in subjects}
    static = entries.pop("none")
    report: dict[str, Any] = {
        "undefended": static.report,
        "defenses": {
            name: {**entry.report, "against_static": against_static(entry.survived, static.survived)}
            if entry.report["worst_case"]
            else entry.report
            for name, entry in entries.items()
        },
    }
    manifest, scores = evaluation.bundle.manifest, aid_scores(evaluation)
    if manifest.aid_threshold is not None:
        report["detection"] = detection(scores, manifest.aid_threshold)
    report["recipe"] = {
        "command": "python -m training evaluate --recipe FILE --bundle DIRECTORY",
        "bundle": f"{manifest.name}@{manifest.version}",
        **recipe.model_dump(mode="json", exclude={"data": {"source"}, "transfer_from": True}),
        "budget": recipe.effort.model_dump(mode="json"),
        "budget_name": recipe.budget if isinstance(recipe.budget, str) else None,
        "transfer_from": sorted(evaluation.transfer),
        "data_sha256": evaluation.data_sha256,
        "data_encodings": list(evaluation.data.encodings),
        "weights_sha256": weights_of(evaluation.bundle),
        "git_commit": evaluation.commit,
        "findings_of_commits": sorted({found["commit"] for found in evaluation.used}),
        "attacks_s": round(sum(found["wall_s"] for found in evaluation.used), 1),
        "libraries": library_versions(),
        "hardware": hardware(),
        "wall_s": round(time.monotonic() - started, 1),
    }
    attacked = [subject for subject in subjects if subject.purifiers and subject.name not in recipe.grey_box_only]
    replace_text(evaluation.progress.directory / f"{recipe.name}.json", json.dumps(report, indent=1) + "\n")
    shown = {subject.name: pictures_of(evaluation, subject) for subject in attacked}
    drawn = page(report, shown, {name: values.tolist() for name, values in scores.items()})
    replace_text(evaluation.progress.directory / f"{recipe.name}.html", drawn)
    if not keep_report:
        write_report(directory, report, drawn)
    return report


def pictures_of(evaluation: Evaluation, subject: Subject) -> list[Picture]:
    """The first images under the full-gradient attack, stage by stage; none if the budget leaves that out."""
    attack = next((attack for attack in planned(evaluation, subject) if attack.name == "full"), None)
    if attack is None:
        return []
    numbers, images, labels = next(evaluation.batches(PICTURES))
    numbers, images, labels = numbers[:PICTURES], images[:PICTURES], labels[:PICTURES]
    adversarial = evaluation.attacked(attack, images, labels, numbers)
    looks = Looks(derive_seed(evaluation.recipe.seed, "pictures"), numbers)
    return pictures(subject.defended, evaluation.bundle.classes, images, labels, adversarial, looks)


def prepare(recipe: EvaluateRecipe, directory: Path, device: torch.device, runs: Path) -> Evaluation:
    """Load everything and refuse what does not fit, before anything is measured."""
    bundle = load_bundle(directory, device)
    for defense in (*recipe.defenses, *recipe.grey_box_only):
        bundle.manifest.resolve(defense)
    loaded = [load_bundle(path, device) for path in recipe.transfer_from]
    others = {f"{other.manifest.name}@{other.manifest.version}": other for other in loaded}
    if len(others) < len(loaded):
        raise DataError("transfer_from names two bundles of the same name and version")
    if "autoattack" in recipe.effort.grey_box and len(bundle.classes) < AUTOATTACK_CLASSES:
        raise DataError(
            f"autoattack needs {AUTOATTACK_CLASSES} classes or more, and this bundle has {len(bundle.classes)}"
        )
    data = load_split(recipe.data, recipe.data.test_split)
    for other in (bundle, *others.values()):
        if data.classes != other.classes or tuple(data.images.shape[2:]) != other.input_size:
            name = f"{other.manifest.name}@{other.manifest.version}"
            raise DataError(f"{recipe.data.name} has other classes or another input_size than the bundle {name}")
    shuffled = data.subset(torch.randperm(len(data), generator=generator_for(recipe.seed, "images")))
    manifest = bundle.manifest
    progress = Progress(runs / "evaluations" / f"{manifest.name}-{manifest.version}")
    return Evaluation(recipe, bundle, shuffled, progress, others, data.fingerprint())
