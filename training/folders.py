"""Image folders: one folder per class, and the layouts of Tiny ImageNet and ImageNet that keep labels in a list."""

from __future__ import annotations

import csv
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from training.config import DataRecipe
from training.formats import DataError, Listing, lines_of, refuse_other_column

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION = ("val", "valid", "validation")
"""One split under three names: folders say `val`, the hub's data sets one of the others."""
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
"""Where Kaggle's ImageNet keeps its splits; the lists of labels and of classes are at the top."""
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's plugins raise for damaged files."""


def read_folder(folder: Path, split: str, recipe: DataRecipe) -> Listing | None:
    """A folder of images `<split>/<class>/**`, Tiny ImageNet, ImageNette or ImageNet.

    Tiny ImageNet's `val/images/` is labeled by `val/val_annotations.txt`, ImageNet's flat `val/` by Kaggle's
    `LOC_val_solution.csv`. Classes are in the order of their folders' names; they are called as `words.txt` or
    `LOC_synset_mapping.txt` say, else as their folders. Raises DataError for a list or an image that is missing,
    and where lists and folders disagree. `pictures` of the listing names the file that cannot be decoded.
    """
    root = folder / KAGGLE if (folder / KAGGLE).is_dir() else folder
    spellings = (split, *VALIDATION) if split in VALIDATION else (split,)
    directory = next((root / name for name in spellings if (root / name).is_dir()), None)
    if directory is None:
        return None
    refuse_other_column(recipe)
    synsets = read_synsets(folder)
    inner = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if inner == ["images"]:
        wnids = read_annotations(directory / f"{directory.name}_annotations.txt")
        paths, labels = list_annotated(directory / "images", wnids, list(synsets))
    elif inner:
        paths, labels = list_class_folders(directory, inner, list(synsets))
    else:
        wnids = read_solution(folder / f"LOC_{directory.name}_solution.csv", directory)
        paths, labels = list_annotated(directory, wnids, list(synsets))
    classes = recipe.classes or distinct(synsets) or tuple(inner)
    return Listing(np.array(labels, np.int64), classes, open_pictures(paths))


def read_synsets(folder: Path) -> dict[str, str]:
    """WordNet ids, sorted, and their names, as the data set lists them; empty where it does not."""
    mapping, wnids = folder / "LOC_synset_mapping.txt", folder / "wnids.txt"
    if mapping.is_file():
        return dict(sorted(fields(line, " ", mapping) for line in lines_of(mapping)))
    if wnids.is_file():
        words = dict(fields(line, "\t", folder / "words.txt") for line in lines_of(folder / "words.txt"))
        return {wnid: words.get(wnid, wnid) for wnid in sorted(lines_of(wnids))}
    return {}


def read_annotations(path: Path) -> dict[str, str]:
    """WordNet ids by file name, from Tiny ImageNet's list: name, id and box, between tabs."""
    if not path.is_file():
        raise DataError(f"{path} is missing: nothing else says what is on the images beside it")
    pairs = (fields(line, "\t", path) for line in lines_of(path))
    return {name: rest.split("\t")[0] for name, rest in pairs}


def read_solution(path: Path, directory: Path) -> dict[str, str]:
    """WordNet ids by file name, from Kaggle's table: an image's id, then an id and a box for each object on it."""
    if not path.is_file():
        raise DataError(f"{directory} has no folders of classes; expected some, or {path} to say what is on its images")
    rows = list(csv.reader(lines_of(path)))
    if rows[0] != ["ImageId", "PredictionString"] or not all(len(row) == 2 and row[1].split() for row in rows):
        raise DataError(f"{path}: expected the columns ImageId and PredictionString")
    return {f"{image}.JPEG": prediction.split()[0] for image, prediction in rows[1:]}


def fields(line: str, separator: str, path: Path) -> tuple[str, str]:
    """What stands before and after the first separator; raises DataError if there is none."""
    first, found, rest = line.partition(separator)
    if not found:
        raise DataError(f"{path}: expected two fields or more in the line {line!r}")
    return first, rest


def list_annotated(directory: Path, wnids: Mapping[str, str], known: Sequence[str]) -> tuple[list[str], list[int]]:
    """Paths and labels of the images in one folder, by name; raises DataError unless its list is exactly theirs."""
    there = {entry.name for entry in os.scandir(directory) if is_image(entry.name)}
    if differing := there ^ wnids.keys():
        first, what = min(differing), "is missing" if min(differing) in wnids else "has no label"
        raise DataError(f"{directory} and its list of labels differ in {len(differing)} images: {first} {what}")
    if unknown := set(wnids.values()) - set(known):
        lists = "wnids.txt or LOC_synset_mapping.txt"
        raise DataError(f"an image in {directory} is labeled {min(unknown)}, a class that no {lists} names")
    label_of = {wnid: label for label, wnid in enumerate(known)}
    names = sorted(wnids)
    return [str(directory / name) for name in names], [label_of[wnids[name]] for name in names]


def list_class_folders(directory: Path, inner: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[int]]:
    """Paths and labels of the images below the class folders, by class and path.

    Raises DataError for a class without images, and if the data set's own list has other classes.
    """
    if known and (differing := set(inner) ^ set(known)):
        raise DataError(f"{directory} and the list of classes differ in {min(differing)}")
    paths, labels = list[str](), list[int]()
    for label, name in enumerate(inner):
        found = [os.path.join(place, file) for place, _, files in os.walk(directory / name) for file in files]
        found = sorted(path for path in found if is_image(path))
        if not found:
            raise DataError(f"{directory / name} holds no images; expected {', '.join(SUFFIXES)}")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def is_image(name: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return name.lower().endswith(SUFFIXES)


def distinct(synsets: Mapping[str, str]) -> tuple[str, ...]:
    """The names of classes; two that share one, as ImageNet's two cranes do, get their ids behind it."""
    count = Counter(synsets.values())
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for wnid, name in synsets.items())


def open_pictures(paths: Iterable[str]) -> Iterator[Image.Image]:
    """Decoded pictures, put upright, one at a time; raises DataError for one that cannot be decoded."""
    for path in paths:
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture)
        except DAMAGED as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error
        upright.format = picture.format
        yield upright
