"""Data sets as tensors: uint8 images (N, 3, H, W) and labels, from the hub or from what lies in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.preprocessing import center_crop_resize, to_rgb
from models.randomness import generator_for
from training.augmentation import Augmentation, augment
from training.config import DataRecipe
from training.folders import read_folder
from training.formats import DataError as DataError
from training.formats import Listing, read_cifar, read_svhn
from training.parallel import group
from training.tables import read_hub, read_parquet


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W), uint8 or float32 in [0, 1]; labels int64 (N,); and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    encodings: tuple[str, ...] = ()
    """How the files were compressed, such as `JPEG`, or `raw`: accuracies on lossy copies are not those on the data."""

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
    """Load one split into memory, every image decoded in turn and brought to `recipe.input_size`.

    `recipe.source` is a folder or a name on the hub, see `open_split`. Raises DataError where there is no such data,
    no image column, no label column or no class names, for a file that is damaged, for an image that cannot be
    decoded, for a label that has no class, and where there is not enough memory.
    """
    listing = open_split(recipe, split)
    labels = torch.from_numpy(listing.labels)
    if not listing.classes:
        raise DataError(f"{recipe.source} has no class names; give them as data.classes")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(listing.classes):
        raise DataError(f"the labels of {recipe.source} ({split}) do not fit {len(listing.classes)} classes")
    shape = (len(labels), 3, recipe.input_size, recipe.input_size)
    try:
        pixels = np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise DataError(f"{recipe.source} ({split}) does not fit into memory: {error}") from error
    encodings = set[str]()
    for place, picture in zip(pixels, listing.pictures, strict=True):
        place[:] = _to_input(picture, recipe.input_size)
        encodings.add(picture.format or "unknown")
    return ImageSet(torch.from_numpy(pixels), labels, listing.classes, tuple(sorted(encodings)))


def open_split(recipe: DataRecipe, split: str) -> Listing:
    """Find one split; its images are decoded as they are taken.

    A folder is read as what it holds: CIFAR-10 or CIFAR-100, SVHN, `<split>-*.parquet` files, or `<split>/` with
    images. Any other source is a name on the hub, `owner/name` or `owner/name:configuration`.
    Raises DataError.
    """
    folder = Path(recipe.source)
    if folder.is_dir():
        for read in READERS:
            if (listing := read(folder, split, recipe)) is not None:
                return listing
        raise DataError(
            f"{folder} holds neither {split}-*.parquet files nor a folder {split}/ of class folders, "
            "nor the files of CIFAR-10, CIFAR-100 or SVHN"
        )
    if folder.is_absolute() or recipe.source.startswith((".", "~")) or recipe.source.count("/") > 1:
        raise DataError(f"there is no folder {folder}")  # no name on the hub is so
    return read_hub(split, recipe)


READERS: tuple[Callable[[Path, str, DataRecipe], Listing | None], ...] = (
    read_cifar,
    read_svhn,
    read_parquet,
    read_folder,
)


def _to_input(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(3, size, size), by the recipe that uploads go through too."""
    return np.asarray(center_crop_resize(to_rgb(image), (size, size))).transpose(2, 0, 1)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Images as float32 in [0, 1], channels last, on `device`; uint8 is divided by 255, floats are left."""
    moved = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return moved if moved.is_floating_point() else moved.float().div_(255)


@dataclass(frozen=True)
class Batches:
    """Training batches by step number: the same step gives the same batch, so that a killed run can go on."""

    data: ImageSet
    batch_size: int
    augmentation: Augmentation
    seed: int
    device: torch.device

    @property
    def together(self) -> int:
        """Images of one step: a batch of each process that trains."""
        return self.batch_size * group().size

    @property
    def steps_per_epoch(self) -> int:
        """Steps with whole batches in one pass; the images that fill none wait for the next epoch's order."""
        return max(1, len(self.data) // self.together)

    def steps_in(self, epochs: float) -> int:
        """How many steps `epochs` passes are; at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Augmented images in [0, 1] and labels of step `step`, this process's share; every epoch has its own order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.data), generator=generator_for(self.seed, "order", epoch))
        chosen = order[position * self.together : (position + 1) * self.together]
        images = to_float(self.data.images[chosen], self.device)
        images = augment(images, self.augmentation, generator_for(self.seed, "augment", step))
        return group().share(images), group().share(self.data.labels[chosen].to(self.device))


def in_batches(data: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole set in order, as float images in [0, 1] and labels."""
    for start in range(0, len(data), batch_size):
        images = to_float(data.images[start : start + batch_size], device)
        yield images, data.labels[start : start + batch_size].to(device)
