from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.preprocessing import center_crop_resize
from tests.training.tiny import CLASSES, SIDE, color_set, colors, write_parquet
from training.config import Augmentation, DataRecipe
from training.data import Batches, DataError, ImageSet, augment, in_batches, load_split, to_float

CPU = torch.device("cpu")
PLAIN = Augmentation(padding=0, flip=False)


@pytest.fixture(autouse=True)
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection in these tests fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def recipe_for(source: Path | str, size: int = SIDE, classes: tuple[str, ...] | None = None) -> DataRecipe:
    return DataRecipe(name="colors", source=str(source), input_size=size, classes=classes)


def write_table(
    folder: Path, columns: Mapping[str, Sequence[object]], features: dict[str, object] | None = None
) -> Path:
    """A parquet file `train` of any columns; `img` holds images."""
    kinds = datasets.Features({"img": datasets.Image(), **features}) if features else None
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def picture(color: int = 0, side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), (color,) * 3)


def two_folders(folder: Path) -> None:
    """An image folder of the classes a, which is empty, and b."""
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
    picture().save(folder / "train" / "b" / "black.png")


def channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


# Where images come from


def test_parquet_files_as_the_hub_stores_them_come_through_bit_exact(tmp_path: Path) -> None:
    pixels, labels = colors(10)
    write_parquet(tmp_path, "train", pixels, labels)
    write_parquet(tmp_path, "test", *colors(4, seed=1))

    train = load_split(recipe_for(tmp_path), "train")

    assert torch.equal(train.images, channels_first(pixels))
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == labels
    assert train.classes == CLASSES
    assert len(train) == 10
    assert len(load_split(recipe_for(tmp_path), "test")) == 4


def test_a_source_that_is_no_folder_is_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels, labels = colors(6)
    write_parquet(tmp_path, "test", pixels, labels)
    table = datasets.load_dataset("parquet", split="train", data_files=str(next(tmp_path.glob("*.parquet"))))
    asked = list[tuple[object, ...]]()

    def hub(name: str, *, split: str, **where: object) -> datasets.Dataset:
        asked.append((name, split, *where.values()))
        return table

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load_split(recipe_for("somebody/colors"), "test")

    assert asked == [("somebody/colors", "test", None, None)]
    assert torch.equal(data.images, channels_first(pixels))
    assert data.labels.tolist() == labels


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for shard in range(3):
        folder = tmp_path / "part"
        write_parquet(folder, "train", *colors(4, seed=shard))
        (folder / "train-00000-of-00001.parquet").rename(tmp_path / f"train-0000{shard}-of-00003.parquet")
    expected = torch.cat([channels_first(colors(4, seed=shard)[0]) for shard in range(3)])
    assert torch.equal(load_split(recipe_for(tmp_path), "train").images, expected)


def test_an_image_folder_names_its_classes_by_its_folders(tmp_path: Path) -> None:
    for index, name in enumerate(["cat", "dog"]):
        (tmp_path / "train" / name).mkdir(parents=True)
        for copy in range(2):
            picture(100 * index + copy).save(tmp_path / "train" / name / f"{copy}.png")

    data = load_split(recipe_for(tmp_path), "train")

    assert data.classes == ("cat", "dog")
    assert sorted(zip(data.labels.tolist(), data.images[:, 0, 0, 0].tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 100),
        (1, 101),
    ]


def test_the_data_tells_how_its_files_were_compressed(tmp_path: Path) -> None:
    for index, kind in enumerate(["png", "jpg"]):
        (tmp_path / "train" / str(index)).mkdir(parents=True)
        picture().save(tmp_path / "train" / str(index) / f"0.{kind}")
    data = load_split(recipe_for(tmp_path), "train")
    assert data.encodings == ("JPEG", "PNG")
    assert data.subset(torch.tensor([0])).encodings == ("JPEG", "PNG")


def test_numbered_labels_take_their_names_from_the_recipe(tmp_path: Path) -> None:
    whole = {"label": datasets.Value("int64")}
    write_table(tmp_path, {"img": [picture(), picture()], "label": [1, 0]}, whole)
    data = load_split(recipe_for(tmp_path, classes=("no", "yes")), "train")
    assert [data.classes[label] for label in data.labels] == ["yes", "no"]
    with pytest.raises(DataError, match=r"data\.classes"):
        load_split(recipe_for(tmp_path), "train")


def test_images_of_any_size_and_mode_go_through_the_one_recipe(tmp_path: Path) -> None:
    wide = Image.fromarray(colors(1, side=20)[0][0]).resize((30, 20))
    grey = Image.new("L", (SIDE, SIDE), 77)
    write_table(tmp_path, {"img": [wide, grey], "label": [0, 1]}, {"label": datasets.ClassLabel(names=list(CLASSES))})

    images = load_split(recipe_for(tmp_path), "train").images

    expected = np.asarray(center_crop_resize(wide, (SIDE, SIDE))).transpose(2, 0, 1)
    assert torch.equal(images[0], torch.from_numpy(expected.copy()))
    assert (images[1] == 77).all()


def test_a_picture_that_lies_on_its_side_is_put_upright(tmp_path: Path) -> None:
    two_folders(tmp_path)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0] = 255  # as stored, the top row is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise"
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "turned.png", exif=exif)

    image = load_split(recipe_for(tmp_path), "train").images[0]

    assert (image[:, :, -1] == 255).all()
    assert (image[:, :, :-1] == 0).all()


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_without_a_class_are_refused(labels: list[int], tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [picture()] * 2, "label": labels}, {"label": datasets.Value("int64")})
    with pytest.raises(DataError, match="do not fit 2 classes"):
        load_split(recipe_for(tmp_path, classes=("no", "yes")), "train")


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({"img": [picture()]}, {}),
        ({"label": [0], "text": ["a"]}, None),
        ({"img": [picture()], "label": ["cat"]}, {"label": datasets.Value("string")}),
    ],
    ids=["no labels", "no images", "labels are words"],
)
def test_tables_without_images_or_whole_labels_are_refused(
    columns: dict[str, list[object]], features: dict[str, object] | None, tmp_path: Path
) -> None:
    write_table(tmp_path, columns, features)
    with pytest.raises(DataError, match="needs an image column and a column of whole labels"):
        load_split(recipe_for(tmp_path, classes=("no", "yes")), "train")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [], "label": []}, {"label": datasets.ClassLabel(names=list(CLASSES))})
    with pytest.raises(DataError):
        load_split(recipe_for(tmp_path), "train")


def test_an_image_that_is_none_is_refused(tmp_path: Path) -> None:
    two_folders(tmp_path)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_split(recipe_for(tmp_path), "train")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match="neither a readable folder"):
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


# Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_padding_and_no_flip_is_the_identity() -> None:
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(augment(images, PLAIN, generator()), images)


def test_flips_are_mirror_images_of_half_of_them() -> None:
    images = torch.rand(400, 1, 2, 2)
    flipped = augment(images, Augmentation(padding=0, flip=True), generator())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    unchanged = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert 150 < mirrored.sum() < 250


def test_crops_are_windows_of_the_reflected_image_and_all_of_them_occur() -> None:
    side, padding = 5, 2
    image = torch.arange(side * side, dtype=torch.float32).view(side, side)
    reflected = torch.from_numpy(np.pad(image.numpy(), padding, mode="reflect"))
    windows = reflected.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side, side)
    assert len(windows) == 25

    crops = augment(image.expand(600, 3, side, side), Augmentation(padding=padding, flip=False), generator())

    assert (crops == crops[:, :1]).all()  # every channel is cut alike
    found = (crops[:, :1] == windows).flatten(2).all(2)
    assert (found.sum(1) == 1).all()
    assert found.any(0).all()


def test_augmentation_is_drawn_by_its_generator_alone() -> None:
    images, both = torch.rand(8, 3, 8, 8), Augmentation(padding=2)
    assert torch.equal(augment(images, both, generator(1)), augment(images, both, generator(1)))
    assert not torch.equal(augment(images, both, generator(1)), augment(images, both, generator(2)))


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
