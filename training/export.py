"""`export`: finished runs become a bundle in a model repository."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import ValidationError

from models.bundle import Bundle
from models.bundle_files import save_bundle
from models.classifiers import Classifier
from models.manifest import AidSpec, AtopSpec, AutoPreset, AutoSpec, ClassifierSpec, Defenses, Manifest, ZeroPurSpec
from training.config import ExportRecipe, RecipeError, refuse_unknown_layers
from training.provenance import fingerprint, git_commit, hardware, library_versions
from training.runs import read_recipe_of, read_summary_of
from training.train_aid import CALIBRATED_RATES, threshold_name
from training.trained import trained_classifier, trained_discriminator, trained_inpainter

EARLIER = ("initial_run", "classifier_run", "purifier_run")
"""Fields of recipes that name the runs which one builds on."""


def export(recipe: ExportRecipe, runs: Path, repository: Path) -> Path:
    """Write `<repository>/<name>/<version>/` from the runs that the recipe names; returns the directory.

    Raises RunError for a run that is missing or not finished, RecipeError for a layer that the classifier does not
    have, for presets that do not fit the trained networks and for a defense that was trained for another classifier,
    BundleError if that version is already there.
    """
    cpu = torch.device("cpu")
    classifier = trained_classifier(runs, recipe.classifier_run, cpu)
    for name in (None if recipe.atop_of_another else recipe.atop_run, recipe.aid_run):
        if name is not None:
            refuse_other_classifier(runs, name, classifier)
    for preset in recipe.zeropur_presets.values():
        refuse_unknown_layers(classifier, preset.layers)
    try:
        described = manifest(recipe, runs)
    except ValidationError as error:
        raise RecipeError(f"the runs and the presets do not fit each other: {error}") from error
    bundle = Bundle(
        described,
        classifier,
        inpainter=None if recipe.atop_run is None else trained_inpainter(runs, recipe.atop_run, cpu),
        discriminator=None if recipe.aid_run is None else trained_discriminator(runs, recipe.aid_run, cpu)[0],
    )
    directory = repository / recipe.name / recipe.version
    save_bundle(bundle, directory)
    return directory


def refuse_other_classifier(runs: Path, name: str, classifier: Classifier) -> None:
    """Raise RecipeError if run `name` was trained for a classifier of other weights."""
    if "classifier_run" not in read_recipe_of(runs, name):
        return  # an in-painter that was only pre-trained
    if read_summary_of(runs, name).get("classifier_sha256") != fingerprint(classifier.state_dict()):
        raise RecipeError(f"run {name} was trained for another classifier: train it again for this one")


def manifest(recipe: ExportRecipe, runs: Path) -> Manifest:
    """What bundle.json will say, but for the hashes of the files."""
    classifier_recipe = read_recipe_of(runs, recipe.classifier_run)
    return Manifest(
        name=recipe.name,
        version=recipe.version,
        classes=read_summary_of(runs, recipe.classifier_run)["classes"],
        input_size=(classifier_recipe["data"]["input_size"],) * 2,
        classifier=ClassifierSpec(
            architecture=classifier_recipe["architecture"], mirrored=classifier_recipe["mirrored"]
        ),
        defenses=Defenses(
            atop=atop(recipe, runs), aid=aid(recipe, runs), zeropur=zeropur(recipe), auto=auto(recipe, runs)
        ),
        default_defense=recipe.default_defense,
        provenance=provenance(recipe, runs),
    )


def atop(recipe: ExportRecipe, runs: Path) -> AtopSpec | None:
    """The in-painter as its run built it, with the recipe's presets."""
    if recipe.atop_run is None:
        return None
    inpainter = read_recipe_of(runs, recipe.atop_run)["inpainter"]
    return AtopSpec(inpainter=inpainter, default_preset=recipe.atop_default_preset, presets=recipe.atop_presets)


def aid(recipe: ExportRecipe, runs: Path) -> AidSpec | None:
    """The discriminator as its run built it, with the recipe's presets and the threshold that the run found."""
    if recipe.aid_run is None:
        return None
    own = {
        "presets": recipe.aid_presets,
        "default_preset": recipe.aid_default_preset,
        "threshold": read_summary_of(runs, recipe.aid_run)["threshold"],
    }
    return AidSpec(**{**read_recipe_of(runs, recipe.aid_run)["discriminator"], **own})


def zeropur(recipe: ExportRecipe) -> ZeroPurSpec | None:
    """ZeroPur has presets only."""
    if not recipe.zeropur_presets:
        return None
    return ZeroPurSpec(default_preset=recipe.zeropur_default_preset, presets=recipe.zeropur_presets)


def auto(recipe: ExportRecipe, runs: Path) -> AutoSpec | None:
    """Presets, each with the threshold that the AID run found for its false-positive rate.

    Raises RecipeError for a rate that the run did not calibrate.
    """
    if not recipe.auto_presets or recipe.aid_run is None:
        return None
    summary, presets = read_summary_of(runs, recipe.aid_run), dict[str, AutoPreset]()
    for name, gate in recipe.auto_presets.items():
        if threshold_name(gate.false_positive_rate) not in summary:
            rates = ", ".join(f"{rate:g}" for rate in CALIBRATED_RATES if threshold_name(rate) in summary)
            known = (
                f"has thresholds at the rates {rates}" if rates else "was calibrated by an older version: train it anew"
            )
            raise RecipeError(f"auto_presets.{name}: run {recipe.aid_run} {known}")
        presets[name] = AutoPreset(**gate.model_dump(), threshold=summary[threshold_name(gate.false_positive_rate)])
    return AutoSpec(default_preset=recipe.auto_default_preset, presets=presets)


def lineage(runs: Path, names: Iterable[str]) -> list[str]:
    """The runs, each behind those that it started from or was trained for, as far as those are still there."""
    found = list[str]()
    for name in names:
        recipe = read_recipe_of(runs, name)
        earlier = [recipe[field] for field in EARLIER if recipe.get(field) is not None]
        there = [each for each in earlier if (runs / each / "summary.json").exists()]
        found += [each for each in (*lineage(runs, there), name) if each not in found]
    return found


def provenance(recipe: ExportRecipe, runs: Path) -> dict[str, object]:
    """Everything that it takes to make the bundle again: recipes, data, commit, versions, time, hardware.

    Each run's summary has its own; those beside the runs are of the export. `networks` says which run made which.
    """
    made = {"classifier": recipe.classifier_run, "inpainter": recipe.atop_run, "discriminator": recipe.aid_run}
    networks = {network: name for network, name in made.items() if name is not None}
    return {
        "runs": {
            name: {"recipe": read_recipe_of(runs, name), "summary": read_summary_of(runs, name)}
            for name in lineage(runs, networks.values())
        },
        "networks": networks,
        "git_commit": git_commit(),
        "libraries": library_versions(),
        "hardware": hardware(),
    }
