"""Tables of images and labels: data sets on the hub, and the parquet files that it stores them in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from training.config import DataRecipe
from training.folders import DAMAGED
from training.formats import DataError, Listing, refuse_other_column

USUAL_LABELS = ("label", "labels", "fine_label")


def read_hub(split: str, recipe: DataRecipe) -> Listing:
    """A data set on the hub; raises DataError if it cannot be reached or lacks what `list_table` needs."""
    name, _, configuration = recipe.source.partition(":")
    return list_table(_load(recipe.source, name, split, configuration=configuration or None), split, recipe)


def read_parquet(folder: Path, split: str, recipe: DataRecipe) -> Listing | None:
    """Parquet files `<split>-*`, wherever in the folder they are; None where there are none.

    Raises DataError if they cannot be read or lack what `list_table` needs.
    """
    files = sorted(str(path) for path in folder.glob(f"**/{split}-*.parquet"))
    if not files:
        return None
    return list_table(_load(recipe.source, "parquet", split, files=files), split, recipe)


def _load(
    source: str, kind: str, split: str, *, configuration: str | None = None, files: list[str] | None = None
) -> datasets.Dataset:
    try:
        data_files = {split: files} if files else None
        return datasets.load_dataset(kind, configuration, split=split, data_files=data_files)
    except Exception as error:  # the library raises a dozen kinds, from three packages, all meaning this
        raise DataError(f"{source!r} is neither a readable folder nor a reachable data set: {error}") from error


def list_table(table: datasets.Dataset, split: str, recipe: DataRecipe) -> Listing:
    """The images and labels of a table.

    Raises DataError if it lacks images, has no column of whole labels, or several of which none is usual.
    """
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    column = _label_column(table.features, recipe)
    if not images or not column:
        what = "an image column and a column of whole labels"
        raise DataError(f"{recipe.source} needs {what}; it has {dict(table.features)}")
    classes = recipe.classes or tuple(getattr(table.features[column], "names", None) or ())
    try:
        labels = np.array(table[column][:], np.int64)
    except TypeError as error:
        raise DataError(f"{recipe.source} ({split}) has images without {column}: {error}") from error
    return Listing(labels, classes, _pictures(table, images[0], f"{recipe.source} ({split})"))


def _label_column(features: datasets.Features, recipe: DataRecipe) -> str | None:
    """The column of labels: the one that the recipe names, one of a usual name, or the only one that names classes."""
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    whole = [name for name, kind in features.items() if _is_whole(kind)]
    if recipe.label_column is not None:
        refuse_other_column(recipe, named + whole)
        return recipe.label_column
    usual = [name for name in USUAL_LABELS if name in named] or [name for name in USUAL_LABELS if name in whole]
    if not usual and len(named) > 1:
        raise DataError(f"{recipe.source} has the labels {', '.join(named)}: choose by data.label_column")
    return next(iter(usual or named), None)


def _is_whole(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")


def _pictures(table: datasets.Dataset, column: str, source: str) -> Iterator[Image.Image]:
    try:
        yield from table[column]
    except DAMAGED as error:
        raise DataError(f"{source} holds an image that cannot be decoded: {error}") from error
