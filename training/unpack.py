"""`unpack`: a bundle becomes the finished runs that it was exported from.

Whoever has a bundle but not its run directories can so build on it: train another purifier for its classifier, or
export its networks with other presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from models.bundle import MANIFEST, Bundle, BundleError, load_bundle
from training.config import RunName
from training.provenance import fingerprint
from training.runs import Checkpoint, RunError, write_finished
from training.trained import as_average


class ToldRun(BaseModel):
    """What bundle.json says of a run."""

    recipe: dict[str, Any]
    summary: dict[str, Any]


def unpack(directory: Path, runs: Path) -> list[Path]:
    """Write `<runs>/<name>/` for every run that the bundle was exported from; returns the directories.

    Weights are those of the bundle, rounded to float16; a run whose network another one trained on, such as the
    pre-training of a fine-tuned in-painter, is left without. Raises BundleError for a bundle that cannot be read or
    does not say what its runs were, and RunError, before anything is written, for a run that is there already.
    """
    bundle = load_bundle(directory)
    told = told_runs(bundle)
    for name in told:
        if (runs / name).exists():
            raise RunError(f"{runs / name} is there already: remove it, or unpack into other --runs")
    checkpoints, classifier_sha256 = checkpoints_of(bundle, told), fingerprint(bundle.classifier.state_dict())
    for name, run in told.items():
        summary = {**run.summary, "unpacked_from": f"{bundle.manifest.name}@{bundle.manifest.version}"}
        if "classifier_sha256" in summary:  # what was trained for this classifier belongs to it still
            summary["classifier_sha256"] = classifier_sha256
        write_finished(runs / name, run.recipe, summary, checkpoints.get(name))
    return [runs / name for name in told]


def told_runs(bundle: Bundle) -> dict[str, ToldRun]:
    """The runs that the bundle was exported from, in the order of their training; raises BundleError."""
    known = TypeAdapter(dict[RunName, ToldRun])
    try:
        return known.validate_python(bundle.manifest.provenance.get("runs"))
    except ValidationError:
        raise BundleError(f"{MANIFEST}: provenance does not say which runs the bundle was exported from") from None


def checkpoints_of(bundle: Bundle, told: Mapping[str, ToldRun]) -> dict[str, Checkpoint]:
    """What the checkpoints of those runs hold: for each network, that of the last run that trained it."""
    last = dict[str, tuple[str, Checkpoint]]()
    for name, run in told.items():
        if "architecture" in run.recipe:
            last["classifier"] = name, as_average(bundle.classifier)
        elif "discriminator" in run.recipe and bundle.discriminator is not None:
            last["discriminator"] = name, {"discriminator": bundle.discriminator.state_dict()}
        elif "inpainter" in run.recipe and bundle.inpainter is not None:
            last["inpainter"] = name, as_average(bundle.inpainter)
    return dict(last.values())
