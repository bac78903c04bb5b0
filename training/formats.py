"""CIFAR-10, CIFAR-100 and SVHN as their authors publish them: files of arrays, read without running what is in them.

A reader takes a folder, a split and the recipe, and returns None where the folder holds something else.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from training.config import DataRecipe


class DataError(ValueError):
    """Data that cannot be used; the message says what was looked for and where."""


@dataclass(frozen=True)
class Listing:
    """A split whose images are still to be decoded.

    `labels` int64 (N,); `classes` their names, empty where the data have none; `pictures` come one at a time, once,
    in the order of the labels, and raise DataError where one cannot be decoded.
    """

    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    pictures: Iterable[Image.Image]


class Arrays(NamedTuple):
    """Images uint8 (N, 3, H, W) and labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def refuse_other_column(recipe: DataRecipe, known: Iterable[str] = ("label",)) -> None:
    """Raise DataError if the recipe names another column of labels than those that its data have."""
    if recipe.label_column is not None and recipe.label_column not in known:
        raise DataError(f"{recipe.source} has the labels {', '.join(known)}, not {recipe.label_column!r}")


def refuse_other_split(recipe: DataRecipe, name: str, split: str, known: Iterable[str]) -> None:
    """Raise DataError if there is no such split."""
    if split not in known:
        raise DataError(f"{recipe.source} holds {name}, whose splits are {', '.join(known)}, not {split!r}")


def raw_pictures(images: NDArray[np.uint8]) -> Iterator[Image.Image]:
    """Arrays (N, 3, H, W) as pictures whose format is `raw`: nothing was lost in compressing them."""
    for image in images:
        picture = Image.fromarray(image.transpose(1, 2, 0))
        picture.format = "raw"
        yield picture


# CIFAR


@dataclass(frozen=True)
class Cifar:
    """What the two sets of the family differ in; a file of the binary version has `.bin` after its name."""

    name: str
    files: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    """By column of labels, in a record's order, the text file of its class names; the last column is the usual one."""
    meta: str
    """The file of class names in the python version."""


CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE**2
CIFARS = (
    Cifar(
        name="CIFAR-10",
        files={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        names={"label": "batches.meta.txt"},
        meta="batches.meta",
    ),
    Cifar(
        name="CIFAR-100",
        files={"train": ("train",), "test": ("test",)},
        names={"coarse_label": "coarse_label_names.txt", "fine_label": "fine_label_names.txt"},
        meta="meta",
    ),
)


def read_cifar(folder: Path, split: str, recipe: DataRecipe) -> Listing | None:
    """CIFAR-10 or CIFAR-100, the binary version or, where there is none, the python version.

    CIFAR-100's labels are `fine_label`, unless `data.label_column` asks for `coarse_label`. Raises DataError for a
    file that is missing, cut short or something else.
    """
    for cifar in CIFARS:
        every = [name for files in cifar.files.values() for name in files]
        for suffix in (".bin", ""):
            if not any((folder / f"{name}{suffix}").is_file() for name in every):
                continue
            refuse_other_split(recipe, cifar.name, split, cifar.files)
            refuse_other_column(recipe, cifar.names)
            column = recipe.label_column or list(cifar.names)[-1]
            paths = [folder / f"{name}{suffix}" for name in cifar.files[split]]
            if suffix:
                parts = [cifar_records(path, list(cifar.names), column) for path in paths]
                classes = recipe.classes or lines_of(folder / cifar.names[column])
            else:
                parts = [cifar_batch(path, column) for path in paths]
                classes = recipe.classes or cifar_meta(folder / cifar.meta, column)
            labels = np.concatenate([part.labels for part in parts])
            return Listing(labels, classes, (picture for part in parts for picture in raw_pictures(part.images)))
    return None


def cifar_records(path: Path, columns: list[str], column: str) -> Arrays:
    """A file of the binary version: records of one byte per column of labels, then the planes red, green and blue."""
    length = len(columns) + CIFAR_PIXELS
    content = np.frombuffer(bytes_of(path), np.uint8)
    if len(content) == 0 or len(content) % length:
        raise DataError(
            f"{path} has {len(content)} bytes; expected whole records of {length}: it is cut short or other"
        )
    records = content.reshape(-1, length)
    images = records[:, len(columns) :].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return Arrays(images, records[:, columns.index(column)].astype(np.int64))


def cifar_batch(path: Path, column: str) -> Arrays:
    """A file of the python version, a pickle: rows of pixels under `data`, and a list of labels."""
    content = unpickle(path)
    match content.get("data"), content.get(f"{column}s"):
        case _Array(state=(_, (_, width), _DType(name="u1" | b"u1"), False, bytes(raw))), list(labels) if (
            width == CIFAR_PIXELS
            and len(raw) == len(labels) * CIFAR_PIXELS > 0
            and all(type(label) is int for label in labels)
        ):
            images = np.frombuffer(raw, np.uint8).reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
            return Arrays(images, np.array(labels, np.int64))
    raise DataError(f"{path} lacks uint8 rows of {CIFAR_PIXELS} pixels, or as many {column}s; {USE_BINARY}")


def cifar_meta(path: Path, column: str) -> tuple[str, ...]:
    """The class names of the python version, from the pickle beside the batches."""
    match unpickle(path).get(f"{column}_names"):
        case list(names) if names and all(isinstance(name, str | bytes) for name in names):
            return tuple(_text(name) for name in names)
    raise DataError(f"{path} has no list {column}_names; give the names as data.classes, or {USE_BINARY}")


def lines_of(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank; raises DataError for a file that is missing, empty or no text."""
    try:
        lines = tuple(line.strip() for line in bytes_of(path).decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def bytes_of(path: Path) -> bytes:
    """The content of a file; raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing or cannot be read: {error.strerror}") from error


# Pickles, without what makes them dangerous: a pickle calls what it names, and here it can name three stand-ins. Not
# even NumPy's own classes are among them, since a forged dtype makes ndarray take bytes for pointers.

USE_BINARY = "use the binary version of the data set"


class _Array:
    """Stands in for numpy.ndarray; `state` is what the pickle says of it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _DType:
    """Stands in for numpy.dtype."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, _: object) -> None:
        """Byte order and alignment are nothing to a byte."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


_STAND_INS: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def unpickle(path: Path) -> dict[str, object]:
    """The dictionary in a pickle of numbers, text and arrays; raises DataError for any other."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is no pickle that can be read safely: {error}; {USE_BINARY}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str | bytes) for key in content):
        raise DataError(f"{path} holds no dictionary; {USE_BINARY}")
    return {_text(key): value for key, value in content.items()}


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


# SVHN

SVHN_FILES = {split: f"{split}_32x32.mat" for split in ("train", "test", "extra")}


def read_svhn(folder: Path, split: str, recipe: DataRecipe) -> Listing | None:
    """SVHN's cropped digits: `X` is (32, 32, 3, N), `y` has 10 for the digit 0.

    Raises DataError for a file that is missing, damaged or something else.
    """
    if not any((folder / file).is_file() for file in SVHN_FILES.values()):
        return None
    refuse_other_split(recipe, "SVHN", split, SVHN_FILES)
    refuse_other_column(recipe)
    path = folder / SVHN_FILES[split]
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # SciPy's parser raises whatever a damaged file leads it to
        raise DataError(f"{path} is no MATLAB file that can be read: {error}") from error
    images, labels = content.get("X"), content.get("y")
    if images is None or labels is None:
        raise DataError(f"{path} needs the variables X and y; it has {sorted(content)}")
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, labels.size):
        raise DataError(
            f"{path}: expected uint8 X (32, 32, 3, N) and N labels, got {images.dtype} {images.shape} and {labels.size}"
        )
    if labels.dtype.kind not in "iuf" or not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(f"{path}: expected labels from 1 to 10")
    digits = labels.ravel().astype(np.int64) % 10
    return Listing(digits, recipe.classes or tuple("0123456789"), raw_pictures(images.transpose(3, 2, 0, 1)))
