"""`unpack`: a bundle becomes the finished runs that it was exported from.

Whoever has a bundle but not its run directories can so build on it: train another purifier for its classifier, or
export its networks with other presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from models.bundle import Bundle, BundleError
from models.bundle_files import MANIFEST, load_bundle
from training.config import RunName
from training.provenance import fingerprint
from training.runs import Checkpoint, RunError, read_recipe_of, write_finished
from training.trained import as_average

MADE_BY = {"classifier": "architecture", "inpainter": "inpainter", "discriminator": "discriminator"}
"""By network, the field that only recipes of the commands that train it have."""
NOT_TOLD = f"{MANIFEST}: provenance does not say which runs the bundle was exported from"


class ToldRun(BaseModel):
    """What bundle.json says of a run."""

    recipe: dict[str, Any]
    summary: dict[str, Any]


def unpack(directory: Path, runs: Path) -> list[Path]:
    """Write `<runs>/<name>/` for every run that the bundle was exported from; returns the directories.

    Weights are those of the bundle, rounded to float16. A run whose network another one trained on (the pre-training of
    a fine-tuned in-painter) is left without, and is not written where it is there already. Raises BundleError for a
    bundle that cannot be read or does not say what its runs were, and RunError, before anything is written, for a
    run that is there already.
    """
    bundle = load_bundle(directory)
    told = told_runs(bundle)
    trained = last_runs(bundle, told)
    checkpoints = {trained[network]: state for network, state in checkpoints_of(bundle).items()}
    written = {name: run for name, run in told.items() if name in checkpoints or not is_there(runs, name, run)}
    for name in written:
        if (runs / name).exists():
            raise RunError(f"{runs / name} is there already: unpack into other --runs, or remove it")
    classifier_sha256 = fingerprint(bundle.classifier.state_dict())
    for name, run in written.items():
        origin = {"unpacked_from": f"{bundle.manifest.name}@{bundle.manifest.version}", "bundle_sha256": bundle.digest}
        if run.recipe.get("classifier_run") == trained["classifier"]:
            origin["classifier_sha256"] = classifier_sha256  # of the classifier as it is now, rounded
        write_finished(runs / name, run.recipe, {**run.summary, **origin}, checkpoints.get(name))
    return [runs / name for name in written]


def told_runs(bundle: Bundle) -> dict[str, ToldRun]:
    """The runs that the bundle was exported from, in the order of their training; raises BundleError."""
    known = TypeAdapter(dict[RunName, ToldRun])
    try:
        return known.validate_python(bundle.manifest.provenance.get("runs"))
    except ValidationError:
        raise BundleError(NOT_TOLD) from None


def last_runs(bundle: Bundle, told: Mapping[str, ToldRun]) -> dict[str, str]:
    """By network, the run whose weights the bundle has: the one that it names, or else the last that trained it.

    Raises BundleError unless every network of the bundle has exactly one.
    """
    if (named := bundle.manifest.provenance.get("networks")) is not None:
        return named_runs(bundle, told, named)
    went_on_with = {run.recipe.get("purifier_run") for run in told.values()}
    trained = dict[str, str]()
    for network in checkpoints_of(bundle):
        field = MADE_BY[network]
        names = [name for name, run in told.items() if field in run.recipe and name not in went_on_with]
        if len(names) != 1:
            raise BundleError(NOT_TOLD)
        (trained[network],) = names
    return trained


def named_runs(bundle: Bundle, told: Mapping[str, ToldRun], named: object) -> dict[str, str]:
    """The run that made each network, as provenance says; raises BundleError unless it says so of all, and no other."""
    try:
        made = TypeAdapter(dict[str, RunName]).validate_python(named)
    except ValidationError:
        raise BundleError(NOT_TOLD) from None
    if made.keys() != checkpoints_of(bundle).keys() or not told.keys() >= set(made.values()):
        raise BundleError(NOT_TOLD)
    return made


def checkpoints_of(bundle: Bundle) -> dict[str, Checkpoint]:
    """What the checkpoint of the run that trained it holds, for each network of the bundle."""
    checkpoints = {"classifier": as_average(bundle.classifier)}
    if bundle.inpainter is not None:
        checkpoints["inpainter"] = as_average(bundle.inpainter)
    if bundle.discriminator is not None:
        checkpoints["discriminator"] = {"discriminator": bundle.discriminator.state_dict()}
    return checkpoints


def is_there(runs: Path, name: str, run: ToldRun) -> bool:
    """Whether a run of that name and recipe is there, finished or not."""
    return (runs / name / "recipe.json").exists() and read_recipe_of(runs, name) == run.recipe
