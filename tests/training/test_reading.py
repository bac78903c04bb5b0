from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from models import load_bundle, save_bundle
from models.files import replace_text
from tests.training.tiny import SIDE, Workshop
from training.config import DataRecipe, RecipeError
from training.reading import neighbors, recipe_of


def test_a_bundle_without_provenance_is_measured_on_images_of_its_size(finished: Workshop) -> None:
    manifest = load_bundle(finished.bundle).manifest
    for provenance in ({}, {"runs": {"by hand": {"recipe": "none"}}}):
        bare = manifest.model_copy(update={"provenance": provenance})
        assert recipe_of(bare, "images").data == DataRecipe(name="colors", source="images", input_size=SIDE)
    with pytest.raises(RecipeError, match="square"):
        recipe_of(manifest.model_copy(update={"input_size": (8, 9)}), "images")


def copied(bundle: Path, repository: Path, name: str, version: int, **changes: object) -> Path:
    """A bundle of another name and version, with other fields of its manifest."""
    directory = repository / name / str(version)
    shutil.copytree(bundle, directory)
    manifest = json.loads((directory / "bundle.json").read_text())
    replace_text(directory / "bundle.json", json.dumps({**manifest, "name": name, "version": str(version), **changes}))
    return directory


def with_another_classifier(bundle: Path, shift: float) -> Path:
    """The bundle, its classifier changed a little."""
    found = load_bundle(bundle)
    with torch.no_grad():
        next(found.classifier.parameters()).add_(shift)
    shutil.rmtree(bundle)
    save_bundle(found, bundle)
    return bundle


def test_neighbors_are_the_newest_bundles_that_see_the_same_with_other_eyes(finished: Workshop, tmp_path: Path) -> None:
    repository = tmp_path / "bundles"
    bundle = copied(finished.bundle, repository, "colors", 1)
    newer = with_another_classifier(copied(finished.bundle, repository, "colors", 2), 0.1)
    with_another_classifier(copied(finished.bundle, repository, "other", 9), 0.2)
    newest = with_another_classifier(copied(finished.bundle, repository, "other", 10), 0.3)
    copied(newest, repository, "the-same-as-other", 1)
    same = copied(finished.bundle, repository, "the-same-classifier", 1)
    with_another_classifier(copied(finished.bundle, repository, "animals", 1, classes=["cat", "dog", "owl"]), 0.4)
    (with_another_classifier(copied(finished.bundle, repository, "damaged", 1), 0.5) / "aid.safetensors").unlink()
    (copied(finished.bundle, repository, "broken", 1) / "bundle.json").write_text("{}")

    assert neighbors(bundle) == [newest]
    assert neighbors(newest) == [newer, same]
