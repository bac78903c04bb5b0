from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from tests.training.tiny import CLASSES, channels_first, colors, picture, recipe_for, write_parquet, write_table
from training.data import DataError, load_split

pytestmark = pytest.mark.usefixtures("no_connections")
TWO = datasets.ClassLabel(names=["no", "yes"])


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


@pytest.mark.parametrize(
    ("source", "asked"),
    [("somebody/digits", ("somebody/digits", None)), ("somebody/digits:cropped", ("somebody/digits", "cropped"))],
)
def test_a_source_that_is_no_folder_is_a_name_on_the_hub(
    source: str, asked: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pixels, labels = colors(6)
    write_parquet(tmp_path, "test", pixels, labels)
    table = datasets.load_dataset("parquet", split="train", data_files=str(next(tmp_path.glob("*.parquet"))))
    calls = list[tuple[object, ...]]()

    def hub(name: str, configuration: str | None, *, split: str, data_files: object) -> datasets.Dataset:
        calls.append((name, configuration, split, data_files))
        return table

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load_split(recipe_for(source), "test")

    assert calls == [(*asked, "test", None)]
    assert torch.equal(data.images, channels_first(pixels))
    assert data.labels.tolist() == labels


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for shard in range(3):
        folder = tmp_path / "part"
        write_parquet(folder, "train", *colors(4, seed=shard))
        (folder / "train-00000-of-00001.parquet").rename(tmp_path / f"train-0000{shard}-of-00003.parquet")
    expected = torch.cat([channels_first(colors(4, seed=shard)[0]) for shard in range(3)])
    assert torch.equal(load_split(recipe_for(tmp_path), "train").images, expected)


def test_numbered_labels_take_their_names_from_the_recipe(tmp_path: Path) -> None:
    whole = {"label": datasets.Value("int64")}
    write_table(tmp_path, {"img": [picture(), picture()], "label": [1, 0]}, whole)
    data = load_split(recipe_for(tmp_path, classes=("no", "yes")), "train")
    assert [data.classes[label] for label in data.labels] == ["yes", "no"]
    with pytest.raises(DataError, match=r"data\.classes"):
        load_split(recipe_for(tmp_path), "train")


def cifar100(folder: Path) -> Path:
    """Two images with the columns of the hub's CIFAR-100, the coarse labels first."""
    columns: dict[str, list[object]] = {"img": [picture()] * 2, "coarse_label": [0, 2], "fine_label": [1, 0]}
    return write_table(folder, columns, {"coarse_label": datasets.ClassLabel(names=list(CLASSES)), "fine_label": TWO})


def test_of_several_labels_the_usual_one_is_taken_unless_the_recipe_names_another(tmp_path: Path) -> None:
    cifar100(tmp_path)
    usual = load_split(recipe_for(tmp_path), "train")
    assert (usual.labels.tolist(), usual.classes) == ([1, 0], ("no", "yes"))
    coarse = load_split(recipe_for(tmp_path, label_column="coarse_label"), "train")
    assert (coarse.labels.tolist(), coarse.classes) == ([0, 2], CLASSES)


def test_a_column_that_is_no_label_is_refused_with_those_that_are(tmp_path: Path) -> None:
    cifar100(tmp_path)
    with pytest.raises(DataError, match="has the labels coarse_label, fine_label, not 'img'"):
        load_split(recipe_for(tmp_path, label_column="img"), "train")


def test_several_labels_of_unusual_names_wait_for_a_choice(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"img": [picture()], "shape": [1], "mood": [0]}
    write_table(tmp_path, columns, {"shape": TWO, "mood": TWO})
    with pytest.raises(DataError, match=r"shape, mood: choose by data\.label_column"):
        load_split(recipe_for(tmp_path), "train")
    assert load_split(recipe_for(tmp_path, label_column="mood"), "train").labels.tolist() == [0]


def test_an_image_without_a_label_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [picture()] * 2, "label": [1, None]}, {"label": TWO})
    with pytest.raises(DataError, match="images without label"):
        load_split(recipe_for(tmp_path), "train")


def test_an_image_in_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, {"img": [{"bytes": b"not a picture", "path": None}], "label": [1]}, {"label": TWO})
    with pytest.raises(DataError, match="cannot be decoded"):
        load_split(recipe_for(tmp_path), "train")


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


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match="neither a readable folder"):
        load_split(recipe_for(tmp_path), "train")
