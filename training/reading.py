"""Recipes as they are read: from TOML, or from what a bundle says of itself; refused whole if anything is wrong."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from models.bundle import BundleError
from models.bundle_files import load_bundle, read_manifest
from models.manifest import Manifest, Strict
from training.config import EvaluateRecipe, RecipeError

AnyRecipe = TypeVar("AnyRecipe", bound=Strict)


def read_recipe(path: Path, kind: type[AnyRecipe], *, data_source: str | None = None, **instead: object) -> AnyRecipe:
    """Read and validate a TOML recipe; `data_source` takes the place of `data.source`, `instead` that of fields.

    Raises RecipeError for a file that cannot be read, a field that is missing, unknown or out of range, and fields
    that contradict each other.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if data_source is not None and isinstance(fields.get("data"), dict):
        fields["data"]["source"] = data_source
    return valid(fields, kind, str(path), instead)


def recipe_of(manifest: Manifest, data_source: str, **instead: object) -> EvaluateRecipe:
    """What `evaluate` measures where no recipe says it: every defense, on the test split that the bundle's runs name.

    Without their provenance it is the split `test`. Raises RecipeError for fields that are out of range.
    """
    height, width = manifest.input_size
    if height != width:
        raise RecipeError(f"{manifest.name}@{manifest.version} takes images of {width}x{height}, and data are square")
    data = {"name": manifest.name, "input_size": width, **trained_on(manifest), "source": data_source}
    return valid({"data": data}, EvaluateRecipe, f"{manifest.name}@{manifest.version}", instead)


def neighbors(directory: Path) -> list[Path]:
    """The newest of every other bundle in a bundle's repository, if it has the same classes and size of images.

    One that has the same classifier as the bundle, or as another before it, adds nothing and is left out; so is what
    cannot be loaded.
    """
    manifest, newest = read_manifest(directory), dict[str, tuple[int, Path]]()
    for path in sorted(Path(os.path.normpath(directory / "../..")).glob("*/*/bundle.json")):
        try:
            other = load_bundle(path.parent).manifest
        except BundleError:
            continue
        same = (other.classes, other.input_size) == (manifest.classes, manifest.input_size)
        if same and other.name != manifest.name:
            found = (int(other.version), path.parent)
            newest[other.name] = max(found, newest.get(other.name, found))
    classifiers = {classifier_of(read_manifest(path)): path for _, path in reversed(newest.values())}
    return sorted(path for weights, path in classifiers.items() if weights != classifier_of(manifest))


def classifier_of(manifest: Manifest) -> str:
    """The hash of a bundle's classifier."""
    return manifest.weights.get("classifier.safetensors", "")


def trained_on(manifest: Manifest) -> Mapping[str, object]:
    """The data recipe of the runs that a bundle was exported from; empty where its provenance names none."""
    match manifest.provenance:
        case {"runs": {**runs}}:
            for run in runs.values():
                match run:
                    case {"recipe": {"data": {**data}}}:
                        return {str(name): value for name, value in data.items()}
    return {}


def valid(fields: dict[str, Any], kind: type[AnyRecipe], where: str, instead: Mapping[str, object]) -> AnyRecipe:
    """The recipe of these fields, and those of `instead` that are given; raises RecipeError, naming `where`."""
    given = {name: value for name, value in instead.items() if value is not None}
    try:
        return kind.model_validate({**fields, **given})
    except ValidationError as error:
        wrong = [f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise RecipeError("\n".join([f"{where} is not a valid {kind.__name__}:", *wrong])) from error
