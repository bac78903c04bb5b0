"""`evaluate`: what a bundle and its defenses are worth, clean and attacked, into its report.json.

The headline is the worst case: an image counts as right only if it withstood every attack of levels L1 to L5, and the
clean image is right too. Beside it stands the same for the bare classifier. Grey-box numbers (L1), which the papers
report, flatter every purifier: their attacker does not know that it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from models import Bundle, load_bundle, write_report
from models.bundle_files import MANIFEST
from models.files import replace_text
from models.manifest import Manifest, ZeroPurPreset
from models.randomness import derive_seed, generator_for
from training.attacks.looks import Looks
from training.attacks.threats import Linf
from training.config import EvaluateRecipe, RecipeError, refuse_unknown_layers
from training.credibility import NOT_ADAPTIVE
from training.data import DataError, load_split
from training.doubts import doubts
from training.evaluation import Evaluation, clean_work, fitted, has_worst_case, planned
from training.forecast import forecast
from training.pictures import Picture, pictures
from training.plan import DLR_CLASSES
from training.progress import Progress
from training.provenance import content_sha256, hardware, library_versions
from training.report import page
from training.statistics import binomial, detection, paired
from training.subject import GROUPS, Subject
from training.unseen import curve_points

COST_BATCH = 32
COST_REPEATS = 3
PICTURES = 6
AUTOATTACK_CLASSES = 4


# --- one entry of the report


@dataclass(frozen=True)
class Entry:
    """One defense, measured: its line in the report, and image by image what was right."""

    report: dict[str, Any]
    survived: Tensor
    """Which of the images that every attack had withstood all of them, (N,)."""
    right: dict[str, Tensor]
    """Which images withstood each attack; `standard` are the clean ones, where they were asked about once."""


def measure(evaluation: Evaluation, subject: Subject) -> Entry:
    """Run every attack of the plan on one defense."""
    attacks = planned(evaluation, subject)
    adaptive = has_worst_case(attacks)
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
    curved = curves(evaluation, subject)
    reasons = [NOT_ADAPTIVE]
    if adaptive:
        reasons = doubts(
            evaluation,
            subject,
            clean=clean[0],
            right={name: right[name][:compared] for name in within},
            levels=levels,
            against_steps=[(int(steps), withstood) for steps, withstood in curved.get("steps", [])],
        )
    cells: dict[str, dict[str, Any]] = {group: {} for group in ("grey_box", "adaptive", "unseen")}
    for attack in attacks:
        settings = {"settings": dict(attack.settings)} if attack.settings else {}
        cells[GROUPS[attack.level]][attack.name] = {
            **binomial(float(right[attack.name].sum()), len(right[attack.name])),
            "level": attack.level,
            "wall_s": round(evaluation.spent_s[subject.name, attack.name], 1),
            **settings,
        }
    report = {
        "standard": binomial(float(clean.sum()) / draws, count),
        **cells,
        "curves": {
            axis: [{axis: value, **binomial(float(withstood.sum()), len(withstood))} for value, withstood in points]
            for axis, points in curved.items()
        },
        "worst_case": {**binomial(float(survived.sum()), compared), "over": ["clean", *within]} if adaptive else None,
        "credible": not reasons,
        "reasons": reasons,
        "cost": round(cost(evaluation, subject), 2),
    }
    return Entry(report, survived, {**({"standard": clean[0]} if draws == 1 else {}), **right})


def curves(evaluation: Evaluation, subject: Subject) -> dict[str, list[tuple[float, Tensor]]]:
    """Which images withstand the full-gradient attack, (N,), at every eps, number of steps and number of draws."""
    found = dict[str, list[tuple[float, Tensor]]]()
    if subject.name in evaluation.recipe.grey_box_only:
        return found
    for axis, points in curve_points(evaluation.planner(), subject).items():
        found[axis] = []
        with tqdm(total=len(points), desc=f"{subject.name} accuracy against {axis}", unit="point") as bar:
            for value, attack in points:
                with tqdm(disable=True) as silent:
                    right = evaluation.withstood(subject, fitted(attack, len(evaluation.data)), silent)
                found[axis].append((value, right))
                bar.update()
    return found


def cost(evaluation: Evaluation, subject: Subject) -> float:
    """Time of defended over undefended inference, for a batch of clean images: the best of three runs of each, in turn.

    What `auto` finds suspicious costs its strong chain, and few clean images are. It is a finding of this machine, so
    that an evaluation that goes on has the number that it had.
    """

    def find() -> dict[str, float]:
        _, images, _ = next(evaluation.batches(COST_BATCH))
        best = {"none": float("inf"), subject.name: float("inf")}
        for _ in range(COST_REPEATS):
            for name in best:
                began = time.perf_counter()
                evaluation.bundle.probabilities(name, images, votes=evaluation.recipe.votes, seed=0).cpu()
                best[name] = min(best[name], time.perf_counter() - began)
        return {"cost": best[subject.name] / best["none"]}

    of = {**evaluation.asked(subject), "cost": COST_BATCH, "device": str(evaluation.device), "hardware": hardware()}
    found: float = evaluation.once(of, find)["cost"]
    return found


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
    recipe: EvaluateRecipe,
    directory: Path,
    device: torch.device,
    runs: Path,
    *,
    keep_report: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Measure a bundle by a recipe and write the report into it, unless `keep_report`; returns the report.

    `command` is what a reader of the report is told to type for the same.

    What was found is kept under `<runs>/evaluations/`, beside a copy of the report that also has every image's outcome,
    and is not measured again.

    Raises BundleError for a bundle that cannot be loaded, UnknownDefense for a defense that it does not offer,
    DataError for data of other classes or another size than the bundle's, or too few classes for an attack, and
    RecipeError for variants that make no preset, for further attacks that bear another's name or are on an AID that the
    bundle does not have, and for what would be in the bundle's report though it is not what the bundle does by default.
    """
    if (recipe.zeropur_variants or recipe.further or recipe.votes > 1) and not keep_report:
        what = "zeropur_variants, further attacks and votes"
        raise RecipeError(f"{what} are not for a bundle's own report: use --keep-report")
    started = time.monotonic()
    evaluation = prepare(recipe, directory, device, runs)
    subjects = evaluation.subjects()
    print(forecast(evaluation, subjects), flush=True)
    entries = {subject.name: measure(evaluation, subject) for subject in subjects}
    outcomes = {name: {what: bits(right) for what, right in entry.right.items()} for name, entry in entries.items()}
    static = entries.pop("none")
    report: dict[str, Any] = {"undefended": static.report, "defenses": {}, "grey_box_only": {}}
    for name, entry in entries.items():
        judged = entry.report["worst_case"] is not None
        beside = {"against_static": paired(entry.survived, static.survived)} if judged else {}
        report["defenses" if judged else "grey_box_only"][name] = {**entry.report, **beside}
    manifest, scores = evaluation.bundle.manifest, aid_scores(evaluation)
    if manifest.aid_threshold is not None:
        report["detection"] = detection(scores, manifest.aid_threshold)
    report["recipe"] = {
        "command": command,
        "bundle": f"{manifest.name}@{manifest.version}",
        **recipe.model_dump(mode="json", exclude={"data": {"source"}, "transfer_from": True}),
        "budget": recipe.effort.model_dump(mode="json"),
        "budget_name": recipe.budget if isinstance(recipe.budget, str) else None,
        "transfer_from": sorted(evaluation.transfer),
        "data_sha256": evaluation.data_sha256,
        "data_encodings": list(evaluation.data.encodings),
        "weights_sha256": evaluation.bundle.manifest.weights,
        "content_sha256": evaluation.content_sha256,
        "git_commit": evaluation.commit,
        "findings_of_commits": sorted({found["commit"] for found in evaluation.used.values()}),
        "attacks_s": round(sum(found["wall_s"] for found in evaluation.used.values()), 1),
        "libraries": library_versions(),
        "hardware": hardware(),
        "wall_s": round(time.monotonic() - started, 1),
    }
    attacked = [subject for subject in subjects if subject.purifiers and subject.name not in recipe.grey_box_only]
    copy = json.dumps({**report, "outcomes": outcomes}, indent=1) + "\n"
    replace_text(evaluation.progress.directory / f"{recipe.name}.json", copy)
    shown = {subject.name: pictures_of(evaluation, subject) for subject in attacked}
    drawn = page(report, shown, {name: values.tolist() for name, values in scores.items()})
    replace_text(evaluation.progress.directory / f"{recipe.name}.html", drawn)
    if not keep_report:
        write_report(directory, report, drawn)
    return report


def bits(right: Tensor) -> str:
    """One digit for every image: 1 where it was labeled right."""
    return "".join(str(int(each)) for each in right.tolist())


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


def with_variants(bundle: Bundle, variants: Mapping[str, Mapping[str, object]]) -> Manifest:
    """The bundle's manifest with further presets of ZeroPur, each the default one with some fields changed.

    Raises RecipeError where there is no ZeroPur, the name is taken, the fields make no preset, or the classifier lacks
    a layer that they name.
    """
    manifest = bundle.manifest
    if not variants:
        return manifest
    spec = manifest.defenses.zeropur
    if spec is None:
        raise RecipeError("zeropur_variants are for a bundle that offers zeropur")
    if taken := variants.keys() & spec.presets.keys():
        raise RecipeError(f"zeropur_variants: the bundle has a preset {', '.join(sorted(taken))} already")
    usual = spec.presets[spec.default_preset].model_dump()
    try:
        added = {name: ZeroPurPreset.model_validate({**usual, **changes}) for name, changes in variants.items()}
    except ValidationError as error:
        raise RecipeError(f"zeropur_variants: {error}") from error
    for preset in added.values():
        refuse_unknown_layers(bundle.classifier, preset.layers)
    presets = {"presets": {**spec.presets, **added}}
    defenses = manifest.defenses.model_copy(update={"zeropur": spec.model_copy(update=presets)})
    return manifest.model_copy(update={"defenses": defenses})


def prepare(recipe: EvaluateRecipe, directory: Path, device: torch.device, runs: Path) -> Evaluation:
    """Load everything and refuse what does not fit, before anything is measured."""
    bundle = load_bundle(directory, device)
    bundle.manifest = with_variants(bundle, recipe.zeropur_variants)
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
    if any(attack.attack == "rand" for attack in recipe.further) and len(bundle.classes) < DLR_CLASSES:
        raise DataError(f"AutoAttack rand needs {DLR_CLASSES} classes, and this bundle has {len(bundle.classes)}")
    if any(attack.attack == "aware_aid" for attack in recipe.further) and bundle.aid is None:
        raise RecipeError("aware_aid among further attacks is for a bundle that offers aid")
    data = load_split(recipe.data, recipe.data.test_split)
    for other in (bundle, *others.values()):
        if data.classes != other.classes or tuple(data.images.shape[2:]) != other.input_size:
            name = f"{other.manifest.name}@{other.manifest.version}"
            raise DataError(f"{recipe.data.name} has other classes or another input_size than the bundle {name}")
    shuffled = data.subset(torch.randperm(len(data), generator=generator_for(recipe.seed, "images")))
    manifest = bundle.manifest
    progress = Progress(runs / "evaluations" / f"{manifest.name}-{manifest.version}")
    content = content_sha256((directory / MANIFEST).read_bytes())
    return Evaluation(recipe, bundle, shuffled, progress, others, data.fingerprint(), content)
