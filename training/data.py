"""Data sets as tensors: uint8 images (N, 3, H, W) and labels, from the hub, parquet files or image folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.preprocessing import center_crop_resize, to_rgb
from models.randomness import generator_for
from training.config import Augmentation, DataRecipe


class DataError(ValueError):
    """Data that cannot be used; the message says what was looked for and where."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W), uint8 or float32 in [0, 1]; labels int64 (N,); and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    encodings: tuple[str, ...] = ()
    """How the files were compressed, such as `JPEG`: accuracies on lossy copies of a data set are not those on it."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def fingerprint(self) -> str:
        """sha256 over pixels and labels: two reports speak of the same images when it is equal."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def load_split(recipe: DataRecipe, split: str) -> ImageSet:
    """Load one split into memory, every image brought to `recipe.input_size`.

    `recipe.source` is a folder of `<split>-*.parquet` files, an image folder (`<split>/<class>/*.png`), or a
    hub name. Raises DataError where there is no such data, no image column, no label column or no class names, and
    for an image that cannot be decoded or a label that has no class.
    """
    table = _open(recipe.source, split)
    image_column, label_column = _columns(table, recipe.source)
    classes = recipe.classes or getattr(table.features[label_column], "names", None)
    if not classes:
        raise DataError(f"{recipe.source} has no class names; give them as data.classes")
    labels = torch.tensor(table[label_column], dtype=torch.int64)
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise DataError(f"the labels of {recipe.source} ({split}) do not fit {len(classes)} classes")
    pixels = np.empty((len(table), 3, recipe.input_size, recipe.input_size), dtype=np.uint8)
    encodings = set[str]()
    try:
        for row, image in enumerate(table[image_column]):
            pixels[row] = _to_input(image, recipe.input_size)
            encodings.add(image.format or "unknown")
    except (OSError, ValueError) as error:
        raise DataError(f"{recipe.source} ({split}) holds an image that cannot be decoded: {error}") from error
    return ImageSet(torch.from_numpy(pixels), labels, tuple(classes), tuple(sorted(encodings)))


def _open(source: str, split: str) -> datasets.Dataset:
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:  # no name on the hub is so
            raise DataError(f"there is no folder {folder}")
        return _read(source, source, split=split)
    parquet = sorted(str(path) for path in folder.glob(f"**/{split}-*.parquet"))
    if parquet:
        return _read(source, "parquet", split=split, data_files={split: parquet})
    if (folder / split).is_dir():
        return _read(source, "imagefolder", split="train", data_dir=str(folder / split))
    raise DataError(f"{folder} holds neither {split}-*.parquet files nor a folder {split}/ of class folders")


def _read(
    source: str, kind: str, *, split: str, data_files: dict[str, list[str]] | None = None, data_dir: str | None = None
) -> datasets.Dataset:
    try:
        return datasets.load_dataset(kind, split=split, data_files=data_files, data_dir=data_dir)
    except Exception as error:  # the library raises a dozen kinds, from three packages, all meaning this
        raise DataError(f"{source!r} is neither a readable folder nor a reachable data set: {error}") from error


def _columns(table: datasets.Dataset, source: str) -> tuple[str, str]:
    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels", "fine_label") if _is_whole(features.get(name))]
    if not images or not labels:
        raise DataError(f"{source} needs an image column and a column of whole labels; it has {dict(features)}")
    return images[0], labels[0]


def _is_whole(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")


def _to_input(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(3, size, size), by the recipe that uploads go through too."""
    return np.asarray(center_crop_resize(to_rgb(image), (size, size))).transpose(2, 0, 1)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Images as float32 in [0, 1], channels last, on `device`; uint8 is divided by 255, floats are left."""
    moved = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return moved if moved.is_floating_point() else moved.float().div_(255)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Random crops of the reflected images and horizontal flips, drawn per image; shape and range stay."""
    count, _, height, width = images.shape
    if settings.padding:
        pad = settings.padding
        offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
        rows = (torch.arange(height) + offsets[0]).to(images.device)
        columns = (torch.arange(width) + offsets[1]).to(images.device)
        padded = F.pad(images, (pad, pad, pad, pad), mode="reflect").permute(0, 2, 3, 1)
        which = torch.arange(count, device=images.device)[:, None, None]
        images = padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if settings.flip:
        flipped = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images


@dataclass(frozen=True)
class Batches:
    """Training batches by step number: the same step gives the same batch, so that a killed run can go on."""

    data: ImageSet
    batch_size: int
    augmentation: Augmentation
    seed: int
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the images that fill no batch wait for the next epoch's order."""
        return max(1, len(self.data) // self.batch_size)

    def steps_in(self, epochs: float) -> int:
        """How many steps `epochs` passes are; at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented images in [0, 1] and labels of step `step`; every epoch has an order of its own."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.data), generator=generator_for(self.seed, "order", epoch))
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        images = to_float(self.data.images[chosen], self.device)
        images = augment(images, self.augmentation, generator_for(self.seed, "augment", step))
        return images, self.data.labels[chosen].to(self.device)


def in_batches(data: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole set in order, as float images in [0, 1] and labels."""
    for start in range(0, len(data), batch_size):
        images = to_float(data.images[start : start + batch_size], device)
        yield images, data.labels[start : start + batch_size].to(device)
