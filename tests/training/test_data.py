from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import training.data
from models.preprocessing import center_crop_resize, to_rgb
from tests.training.tiny import (
    CLASSES,
    SIDE,
    color_set,
    colors,
    picture,
    recipe_for,
    write_parquet,
    write_table,
)
from training.augmentation import Augmentation
from training.data import Batches, DataError, ImageSet, in_batches, load_split, open_split, to_float

pytestmark = pytest.mark.usefixtures("no_connections")
CPU = torch.device("cpu")
PLAIN = Augmentation(padding=0, flip=False)


# Where images come from


def test_images_of_any_size_and_mode_go_through_the_one_recipe(tmp_path: Path) -> None:
    wide = Image.fromarray(colors(1, side=20)[0][0]).resize((30, 20))
    grey = Image.new("L", (SIDE, SIDE), 77)
    write_table(tmp_path, {"img": [wide, grey], "label": [0, 1]}, {"label": datasets.ClassLabel(names=list(CLASSES))})

    images = load_split(recipe_for(tmp_path), "train").images

    expected = np.asarray(center_crop_resize(wide, (SIDE, SIDE))).transpose(2, 0, 1)
    assert torch.equal(images[0], torch.from_numpy(expected.copy()))
    assert (images[1] == 77).all()


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_without_a_class_are_refused(labels: list[int], tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [picture()] * 2, "label": labels}, {"label": datasets.Value("int64")})
    with pytest.raises(DataError, match="do not fit 2 classes"):
        load_split(recipe_for(tmp_path, classes=("no", "yes")), "train")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [], "label": []}, {"label": datasets.ClassLabel(names=list(CLASSES))})
    with pytest.raises(DataError):
        load_split(recipe_for(tmp_path), "train")


@pytest.mark.parametrize("source", ["/no/such/folder", "./data", "../no/such", "~/data", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match="there is no folder"):
        load_split(recipe_for(source), "train")


def test_a_folder_without_the_split_and_an_unreachable_name_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", *colors(3))
    with pytest.raises(DataError, match=r"neither test-\*\.parquet"):
        load_split(recipe_for(tmp_path), "test")
    with pytest.raises(DataError, match="no/such-data"):
        load_split(recipe_for("no/such-data"), "train")


def test_images_are_decoded_one_at_a_time_when_they_are_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    picture(9).save(tmp_path / "train" / "a" / "whole.png")
    (tmp_path / "train" / "b" / "broken.png").write_bytes(b"not a picture")

    listing = open_split(recipe_for(tmp_path), "train")

    taken = iter(listing.pictures)
    assert listing.labels.tolist() == [0, 1]
    assert next(taken).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(DataError, match=r"broken\.png"):
        next(taken)


def test_no_two_images_are_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture().save(tmp_path / "train" / name / "0.png")
    events = list[str]()

    def noted(event: str, function: Callable[..., object]) -> Callable[..., object]:
        def note_and_call(*arguments: object) -> object:
            events.append(event)
            return function(*arguments)

        return note_and_call

    monkeypatch.setattr(ImageOps, "exif_transpose", noted("decoded", ImageOps.exif_transpose))
    monkeypatch.setattr(training.data, "to_rgb", noted("stored", to_rgb))
    load_split(recipe_for(tmp_path), "train")

    assert events == ["decoded", "stored"] * 3


def test_more_pixels_than_there_can_be_memory_for_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", *colors(3))
    with pytest.raises(DataError, match="does not fit into memory"):
        load_split(recipe_for(tmp_path, size=10**7), "train")


# Image sets


def test_the_fingerprint_knows_pixels_labels_and_order() -> None:
    data = color_set(6)
    changed = data.images.clone()
    changed[3, 1, 2, 2] += 1
    others = [
        ImageSet(changed, data.labels, CLASSES),
        ImageSet(data.images, data.labels.flip(0), CLASSES),
        data.subset(torch.arange(6).flip(0)),
    ]
    prints = {one.fingerprint() for one in (data, *others)}
    assert len(prints) == 4
    assert color_set(6).fingerprint() == data.fingerprint()


def test_bytes_become_floats_from_0_to_1_and_floats_stay(device: torch.device) -> None:
    whole = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_float(whole, device).flatten().tolist() == pytest.approx([0, 0.2, 1])
    exact = torch.rand(2, 3, 4, 4)
    assert torch.equal(to_float(exact, device).cpu(), exact)
    assert to_float(color_set(2).images, device).is_contiguous(memory_format=torch.channels_last)


def test_in_batches_gives_everything_once_and_in_order() -> None:
    data = color_set(7)
    batches = list(in_batches(data, 3, CPU))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), to_float(data.images, CPU))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


# Batches by step


def numbered(count: int) -> ImageSet:
    """Images whose pixels are their number."""
    numbers = torch.arange(count, dtype=torch.uint8)
    return ImageSet(numbers.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), numbers.long(), ("a",) * count)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(numbered(12), 4, PLAIN, seed=0, device=CPU)
    assert batches.steps_per_epoch == 3
    orders = []
    for epoch in range(3):
        parts = [batches.at(3 * epoch + position) for position in range(3)]
        order = torch.cat([labels for _, labels in parts])
        assert order.sort().values.tolist() == list(range(12))
        assert ((255 * torch.cat([images for images, _ in parts])[:, 0, 0, 0]).round() == order).all()
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2] != list(range(12))


def test_a_step_always_gives_the_same_batch() -> None:
    def batch(step: int, seed: int = 0) -> torch.Tensor:
        return Batches(color_set(12), 4, Augmentation(padding=1), seed=seed, device=CPU).at(step)[0]

    assert torch.equal(batch(5), batch(5))
    assert not torch.equal(batch(5), batch(8))
    assert not torch.equal(batch(5), batch(5, seed=1))


def test_what_fills_no_batch_waits_and_too_few_images_are_one_batch() -> None:
    batches = Batches(numbered(11), 4, PLAIN, seed=0, device=CPU)
    assert batches.steps_per_epoch == 2
    assert len({int(label) for step in (0, 1) for label in batches.at(step)[1]}) == 8
    few = Batches(numbered(3), 4, PLAIN, seed=0, device=CPU)
    assert few.steps_per_epoch == 1
    assert len(few.at(0)[1]) == 3


@pytest.mark.parametrize(("epochs", "steps"), [(2, 6), (0.5, 2), (1.3, 4), (0.01, 1)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    assert Batches(numbered(12), 4, PLAIN, seed=0, device=CPU).steps_in(epochs) == steps
