from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny import SIDE, picture, recipe_for
from training.data import DataError, ImageSet, load_split

pytestmark = pytest.mark.usefixtures("no_connections")

FISH, NEWT = "n01443537", "n01629819"
WORDS = {FISH: "goldfish, Carassius auratus", NEWT: "European fire salamander, Salamandra salamandra"}


def save(path: Path, color: int) -> None:
    """A grey picture; the JPEGs of one color keep it exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(color).save(path)


def shown(data: ImageSet) -> list[tuple[str, int]]:
    """The class and the color of every image."""
    colors = data.images[:, 0, 0, 0].tolist()
    assert all((image == color).all() for image, color in zip(data.images, colors, strict=True))
    return [(data.classes[label], color) for label, color in zip(data.labels.tolist(), colors, strict=True)]


# One folder per class


def two_folders(folder: Path) -> Path:
    """An image folder of the classes a and b, one image each."""
    for color, name in enumerate(("a", "b")):
        save(folder / "train" / name / "0.png", color)
    return folder


def test_an_image_folder_names_its_classes_by_its_folders(tmp_path: Path) -> None:
    for index, name in enumerate(["cat", "dog"]):
        for copy in range(2):
            save(tmp_path / "train" / name / f"{copy}.png", 100 * index + copy)

    data = load_split(recipe_for(tmp_path), "train")

    assert data.classes == ("cat", "dog")
    assert shown(data) == [("cat", 0), ("cat", 1), ("dog", 100), ("dog", 101)]


def test_images_may_lie_deeper_and_beside_other_files(tmp_path: Path) -> None:
    two_folders(tmp_path)
    save(tmp_path / "train" / "a" / "deep" / "1.JPEG", 7)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    assert shown(load_split(recipe_for(tmp_path), "train")) == [("a", 0), ("a", 7), ("b", 1)]


def test_a_recipe_may_call_the_classes_otherwise(tmp_path: Path) -> None:
    two_folders(tmp_path)
    assert shown(load_split(recipe_for(tmp_path, classes=("ant", "bee")), "train")) == [("ant", 0), ("bee", 1)]


def test_the_data_tells_how_its_files_were_compressed(tmp_path: Path) -> None:
    for index, kind in enumerate(["png", "jpg"]):
        save(tmp_path / "train" / str(index) / f"0.{kind}", 0)
    data = load_split(recipe_for(tmp_path), "train")
    assert data.encodings == ("JPEG", "PNG")
    assert data.subset(torch.tensor([0])).encodings == ("JPEG", "PNG")


def test_a_picture_that_lies_on_its_side_is_put_upright(tmp_path: Path) -> None:
    two_folders(tmp_path)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0] = 255  # as stored, the top row is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise"
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "0.png", exif=exif)

    data = load_split(recipe_for(tmp_path), "train")

    assert (data.images[0, :, :, -1] == 255).all()
    assert (data.images[0, :, :, :-1] == 0).all()
    assert data.encodings == ("PNG",)


@pytest.mark.parametrize("kind", ["png", "JPEG"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_an_image_that_is_none_or_half_of_one_is_refused_by_name(kind: str, share: float, tmp_path: Path) -> None:
    two_folders(tmp_path)
    broken = tmp_path / "train" / "b" / f"broken.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(broken)
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))] or b"not a picture")
    with pytest.raises(DataError, match=rf"b/broken\.{kind} cannot be decoded"):
        load_split(recipe_for(tmp_path), "train")


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    two_folders(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="train/c holds no images"):
        load_split(recipe_for(tmp_path), "train")


def test_folders_have_one_kind_of_labels(tmp_path: Path) -> None:
    two_folders(tmp_path)
    assert len(load_split(recipe_for(tmp_path, label_column="label"), "train")) == 2
    with pytest.raises(DataError, match="has the labels label, not 'fine_label'"):
        load_split(recipe_for(tmp_path, label_column="fine_label"), "train")


# ImageNette


@pytest.mark.parametrize("split", ["val", "valid", "validation"])
def test_imagenettes_validation_folder_answers_to_the_hubs_names_too(split: str, tmp_path: Path) -> None:
    for color, wnid in enumerate((FISH, NEWT)):
        save(tmp_path / "train" / wnid / f"{wnid}_1.JPEG", color)
        save(tmp_path / "val" / wnid / f"{wnid}_9.JPEG", 10 + color)
    (tmp_path / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")
    assert shown(load_split(recipe_for(tmp_path), split)) == [(FISH, 10), (NEWT, 11)]
    assert shown(load_split(recipe_for(tmp_path), "train")) == [(FISH, 0), (NEWT, 1)]
    with pytest.raises(DataError, match="nor a folder test/"):
        load_split(recipe_for(tmp_path), "test")


# Tiny ImageNet


def tiny_imagenet(folder: Path) -> Path:
    """Its layout with two of its classes, listed in another order than that of their ids."""
    for color, wnid in enumerate((FISH, NEWT)):
        for copy in range(2):
            save(folder / "train" / wnid / "images" / f"{wnid}_{copy}.JPEG", 10 * color + copy)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for number, color in enumerate((30, 40, 50)):
        save(folder / "val" / "images" / f"val_{number}.JPEG", color)
    annotations = [(2, FISH), (0, NEWT), (1, FISH)]
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in annotations)
    )
    save(folder / "test" / "images" / "test_0.JPEG", 0)
    (folder / "wnids.txt").write_text(f"{NEWT}\n{FISH}\n")
    (folder / "words.txt").write_text("n00001740\tentity\n" + "".join(f"{i}\t{name}\n" for i, name in WORDS.items()))
    return folder


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    recipe = recipe_for(tiny_imagenet(tmp_path))
    fish, newt = WORDS[FISH], WORDS[NEWT]

    train, val = load_split(recipe, "train"), load_split(recipe, "val")

    assert train.classes == val.classes == (fish, newt)
    assert train.encodings == ("JPEG",)
    assert shown(train) == [(fish, 0), (fish, 1), (newt, 10), (newt, 11)]
    assert shown(val) == [(newt, 30), (fish, 40), (fish, 50)]


def test_tiny_imagenet_whose_validation_images_were_sorted_into_folders_is_read_too(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    for number, wnid in enumerate((NEWT, FISH, FISH)):
        (tmp_path / "val" / wnid).mkdir(exist_ok=True)
        (tmp_path / "val" / "images" / f"val_{number}.JPEG").rename(tmp_path / "val" / wnid / f"val_{number}.JPEG")
    (tmp_path / "val" / "images").rmdir()
    data = load_split(recipe_for(tmp_path), "val")
    assert shown(data) == [(WORDS[FISH], 40), (WORDS[FISH], 50), (WORDS[NEWT], 30)]


def test_tiny_imagenets_test_images_have_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test_annotations\.txt is missing"):
        load_split(recipe_for(tiny_imagenet(tmp_path)), "test")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("val/val_annotations.txt", None, r"val_annotations\.txt is missing"),
        ("val/val_annotations.txt", "", r"val_annotations\.txt is empty"),
        ("val/val_annotations.txt", f"val_0.JPEG {FISH}\n", r"val_annotations\.txt: expected two fields"),
        ("val/val_annotations.txt", f"val_0.JPEG\t{FISH}\n", r"2 images: val_1\.JPEG has no label"),
        ("val/images/val_1.JPEG", None, r"1 images: val_1\.JPEG is missing"),
        ("wnids.txt", f"{FISH}\n", f"labeled {NEWT}, a class that no wnids.txt"),
        ("wnids.txt", None, f"labeled {FISH}, a class that no wnids.txt"),
        ("words.txt", None, r"words\.txt is missing"),
        ("words.txt", "n00001740 entity\n", r"words\.txt: expected two fields"),
        ("words.txt", b"\xff\xfe\x00", r"words\.txt is no text"),
    ],
)
def test_tiny_imagenets_lists_must_be_whole(
    file: str, content: str | bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tiny_imagenet(tmp_path) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=reason):
        load_split(recipe_for(tmp_path), "val")


def test_a_class_that_was_not_unpacked_is_missed(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "train" / NEWT).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"train and the list of classes differ in {NEWT}"):
        load_split(recipe_for(tmp_path), "train")


# ImageNet

CRANES = {"n02012849": "crane", "n03126707": "crane", "n01440764": "tench, Tinca tinca"}


def imagenet(folder: Path, splits: Path) -> Path:
    """Kaggle's layout: class folders for training, one flat folder for validation, lists at the top."""
    for color, wnid in enumerate(sorted(CRANES)):
        save(splits / "train" / wnid / f"{wnid}_10.JPEG", color)
    for number in (1, 2, 3):
        save(splits / "val" / f"ILSVRC2012_val_{number:08}.JPEG", 100 + number)
    save(splits / "test" / "ILSVRC2012_test_00000001.JPEG", 0)
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in CRANES.items()))
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n03126707 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01440764 5 6 7 8 \n"
        "ILSVRC2012_val_00000003,n02012849 1 2 3 4 \n"
    )
    return folder


@pytest.mark.parametrize("splits", ["ILSVRC/Data/CLS-LOC", "."])
def test_imagenet_is_read_as_kaggle_packs_it(splits: str, tmp_path: Path) -> None:
    recipe = recipe_for(imagenet(tmp_path, tmp_path / splits))

    train, val = load_split(recipe, "train"), load_split(recipe, "validation")

    assert train.classes == val.classes == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    assert train.labels.tolist() == [0, 1, 2]
    assert shown(val) == [("tench, Tinca tinca", 101), ("crane (n03126707)", 102), ("crane (n02012849)", 103)]
    with pytest.raises(DataError, match=r"expected some, or .*LOC_test_solution\.csv"):
        load_split(recipe, "test")


def test_imagenet_in_class_folders_alone_has_its_ids_for_names(tmp_path: Path) -> None:
    for color, wnid in enumerate(sorted(CRANES)):
        save(tmp_path / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", color)
    assert shown(load_split(recipe_for(tmp_path), "val")) == list(zip(sorted(CRANES), range(3), strict=True))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("ILSVRC2012_val_00000001,n01440764 1 2 3 4\n", "expected the columns ImageId and PredictionString"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001\n", "expected the columns"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001, \n", "expected the columns"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n", r"00000002\.JPEG has no label"),
    ],
)
def test_imagenets_table_of_labels_must_be_whole(content: str, reason: str, tmp_path: Path) -> None:
    (imagenet(tmp_path, tmp_path) / "LOC_val_solution.csv").write_text(content)
    with pytest.raises(DataError, match=reason):
        load_split(recipe_for(tmp_path), "val")
