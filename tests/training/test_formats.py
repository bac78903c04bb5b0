from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.io import savemat

from tests.training.tiny import channels_first, recipe_for
from training.data import DataError, load_split

pytestmark = pytest.mark.usefixtures("no_connections")

NAMES = ("airplane", "automobile", "bird")
FINE, COARSE = ("apple", "bear", "lamp"), ("fruit", "beasts", "furniture")


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images (N, 32, 32, 3) of which no two pixels agree."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def planes(image: NDArray[np.uint8]) -> bytes:
    """The 3072 bytes of an image in both versions of CIFAR: red, green, blue, each row by row."""
    return b"".join(image[:, :, channel].tobytes() for channel in range(3))


# CIFAR, the binary version


def write_cifar10(folder: Path) -> Path:
    """Two images in each of the six files, labeled by the file's number and 0."""
    for number, name in enumerate([*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]):
        first, second = noise(2, seed=number)
        record = bytes([number % 3]) + planes(first) + bytes([0]) + planes(second)
        (folder / f"{name}.bin").write_bytes(record)
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def test_cifar10s_batches_are_read_in_order(tmp_path: Path) -> None:
    recipe = recipe_for(write_cifar10(tmp_path), size=32)

    train, test = load_split(recipe, "train"), load_split(recipe, "test")

    assert torch.equal(train.images, channels_first(np.concatenate([noise(2, seed=number) for number in range(5)])))
    assert train.labels.tolist() == [0, 0, 1, 0, 2, 0, 0, 0, 1, 0]
    assert train.classes == test.classes == NAMES
    assert train.encodings == ("raw",)
    assert torch.equal(test.images, channels_first(noise(2, seed=5)))
    assert test.labels.tolist() == [2, 0]


def test_a_record_is_a_label_and_then_red_green_and_blue_rows(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    content = bytearray(3073)
    content[0] = 2
    content[1 + 5] = 10  # red, first row, sixth column
    content[1 + 1024 + 3 * 32] = 20  # green, fourth row, first column
    content[1 + 2048 + 31 * 32 + 31] = 30  # blue, bottom right
    (tmp_path / "test_batch.bin").write_bytes(content)

    data = load_split(recipe_for(tmp_path, size=32), "test")

    assert data.labels.tolist() == [2]
    assert data.images.nonzero().tolist() == [[0, 0, 0, 5], [0, 1, 3, 0], [0, 2, 31, 31]]
    assert data.images[data.images > 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("missing", ["data_batch_4.bin", "batches.meta.txt"])
def test_a_missing_file_of_cifar10_is_named(missing: str, tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=f"{missing} is missing"):
        load_split(recipe_for(tmp_path, size=32), "train")


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_a_batch_that_is_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / "data_batch_2.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"data_batch_2\.bin has {size} bytes; expected whole records of 3073"):
        load_split(recipe_for(tmp_path, size=32), "train")


@pytest.mark.parametrize(("content", "reason"), [(b"\n\n", "is empty"), (b"\xff\xfe", "is no text")])
def test_names_that_are_none_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (write_cifar10(tmp_path) / "batches.meta.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"batches\.meta\.txt {reason}"):
        load_split(recipe_for(tmp_path, size=32), "train")


def test_fewer_names_than_labels_are_refused_and_a_recipe_can_give_them(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\n")
    with pytest.raises(DataError, match="do not fit 2 classes"):
        load_split(recipe_for(tmp_path, size=32), "train")
    assert load_split(recipe_for(tmp_path, size=32, classes=("a", "b", "c")), "train").classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("split", "column", "reason"),
    [
        ("validation", None, "holds CIFAR-10, whose splits are train, test, not 'validation'"),
        ("train", "fine_label", "has the labels label, not 'fine_label'"),
    ],
)
def test_a_split_or_labels_that_cifar10_does_not_have_are_refused(
    split: str, column: str | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=reason):
        load_split(recipe_for(write_cifar10(tmp_path), label_column=column), split)


def write_cifar100(folder: Path) -> Path:
    """Two images in `train.bin`, one in `test.bin`."""
    first, second, third = noise(3)
    (folder / "train.bin").write_bytes(bytes([1, 2]) + planes(first) + bytes([0, 1]) + planes(second))
    (folder / "test.bin").write_bytes(bytes([2, 0]) + planes(third))
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder


def test_cifar100_has_fine_labels_and_on_request_coarse_ones(tmp_path: Path) -> None:
    write_cifar100(tmp_path)

    fine = load_split(recipe_for(tmp_path, size=32), "train")
    coarse = load_split(recipe_for(tmp_path, size=32, label_column="coarse_label"), "train")

    assert (fine.labels.tolist(), fine.classes) == ([2, 1], FINE)
    assert (coarse.labels.tolist(), coarse.classes) == ([1, 0], COARSE)
    assert torch.equal(fine.images, channels_first(noise(3)[:2]))
    assert torch.equal(coarse.images, fine.images)
    assert load_split(recipe_for(tmp_path, size=32), "test").labels.tolist() == [0]


def test_cifar100s_records_are_longer(tmp_path: Path) -> None:
    (write_cifar100(tmp_path) / "test.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"test\.bin has 3073 bytes; expected whole records of 3074"):
        load_split(recipe_for(tmp_path, size=32), "test")


# CIFAR, the python version


def python2_pickle(value: object) -> bytes:
    """Bytes as Python 2 and its NumPy wrote the published files."""
    return b"\x80\x02" + opcodes(value) + b"."


def opcodes(value: object) -> bytes:
    """Protocol 2 as cPickle wrote it, without its memo."""
    match value:
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
        case np.ndarray():
            rows, columns = value.shape
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
            kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            return (
                empty
                + b"(K\x01("
                + opcodes(rows)
                + opcodes(columns)
                + b"t"
                + kind
                + b"\x89"
                + opcodes(value.tobytes())
                + b"tb"
            )
    raise TypeError(type(value))


def rows(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 3072), as the python version has them."""
    return np.frombuffer(b"".join(planes(image) for image in images), np.uint8).reshape(-1, 3072)


def write_cifar10_python(folder: Path) -> Path:
    for number, name in enumerate([*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]):
        batch = {b"batch_label": b"one of six", b"labels": [number % 3], b"data": rows(noise(1, seed=number))}
        (folder / name).write_bytes(python2_pickle({**batch, b"filenames": [b"a_s_000001.png"]}))
    meta = {b"num_cases_per_batch": 10000, b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return folder


def test_the_published_pickles_of_cifar10_are_read(tmp_path: Path) -> None:
    data = load_split(recipe_for(write_cifar10_python(tmp_path), size=32), "train")
    assert torch.equal(data.images, channels_first(np.concatenate([noise(1, seed=number) for number in range(5)])))
    assert data.labels.tolist() == [0, 1, 2, 0, 1]
    assert data.classes == NAMES


def test_the_published_pickles_of_cifar100_are_read(tmp_path: Path) -> None:
    batch = {b"data": rows(noise(2)), b"fine_labels": [2, 1], b"coarse_labels": [1, 0]}
    (tmp_path / "train").write_bytes(python2_pickle(batch))
    names = {b"fine_label_names": [name.encode() for name in FINE], b"coarse_label_names": [b"fruit", b"beasts"]}
    (tmp_path / "meta").write_bytes(python2_pickle(names))

    fine = load_split(recipe_for(tmp_path, size=32), "train")
    coarse = load_split(recipe_for(tmp_path, size=32, label_column="coarse_label"), "train")

    assert torch.equal(fine.images, channels_first(noise(2)))
    assert (fine.labels.tolist(), fine.classes) == ([2, 1], FINE)
    assert (coarse.labels.tolist(), coarse.classes) == ([1, 0], ("fruit", "beasts"))


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_that_were_written_anew_are_read(protocol: int, tmp_path: Path) -> None:
    write_cifar10_python(tmp_path)
    batch = {"labels": [1], "data": rows(noise(1, seed=9))}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES)}, protocol))
    data = load_split(recipe_for(tmp_path, size=32), "test")
    assert torch.equal(data.images, channels_first(noise(1, seed=9)))
    assert data.classes == NAMES


class Runs:
    """What a hostile pickle does: it calls a function when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path)
    content = pickle.dumps({"labels": [1], "data": Runs(tmp_path / "trace")})
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch is no pickle that can be read safely: .*mkdir; use the binary"):
        load_split(recipe_for(tmp_path, size=32), "test")
    assert not (tmp_path / "trace").exists()
    pickle.loads(content)  # it does run where nothing holds it back
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", [b"builtins\neval", b"numpy\nload", b"numpy.core.multiarray\nscalar", b"_codecs\nencode", b"os\nsystem"]
)
def test_a_pickle_may_name_only_what_an_array_needs(name: bytes, tmp_path: Path) -> None:
    (write_cifar10_python(tmp_path) / "test_batch").write_bytes(b"\x80\x02}U\x04datac" + name + b"\ns.")
    with pytest.raises(DataError, match="it asks for " + name.decode().replace("\n", r"\.")):
        load_split(recipe_for(tmp_path, size=32), "test")


GOOD: Mapping[bytes, object] = {b"labels": [1], b"data": rows(noise(1))}


@pytest.mark.parametrize(
    "content",
    [
        python2_pickle({**GOOD, b"labels": [1, 2]}),
        python2_pickle({**GOOD, b"labels": []}),
        python2_pickle({**GOOD, b"labels": [b"one"]}),
        python2_pickle({**GOOD, b"data": rows(noise(1)).T}),
        python2_pickle({**GOOD, b"data": [1, 2, 3]}),
        python2_pickle({b"labels": [1]}),
        python2_pickle({b"data": rows(noise(1))}),
        pickle.dumps({"labels": [1], "data": rows(noise(1)).view(np.int8)}, 4),
        pickle.dumps({"labels": [1, 1], "data": np.asfortranarray(rows(noise(2)))}, 4),
    ],
    ids=["labels", "no labels", "words", "columns", "a list", "no data", "no list", "signed", "by columns"],
)
def test_a_batch_that_is_not_rows_of_pixels_and_labels_is_refused(content: bytes, tmp_path: Path) -> None:
    (write_cifar10_python(tmp_path) / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch lacks uint8 rows of 3072 pixels.*use the binary version"):
        load_split(recipe_for(tmp_path, size=32), "test")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_pickle_that_is_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    path = write_cifar10_python(tmp_path) / "test_batch"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="test_batch is no pickle that can be read safely"):
        load_split(recipe_for(tmp_path, size=32), "test")


def test_a_pickle_of_something_else_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path)
    (tmp_path / "batches.meta").write_bytes(python2_pickle({b"names": [b"a"]}))
    with pytest.raises(DataError, match=r"batches\.meta has no list label_names"):
        load_split(recipe_for(tmp_path, size=32), "test")
    (tmp_path / "test_batch").write_bytes(python2_pickle([1, 2]))
    with pytest.raises(DataError, match="test_batch holds no dictionary"):
        load_split(recipe_for(tmp_path, size=32), "test")
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        load_split(recipe_for(tmp_path, size=32), "train")


# SVHN


def write_svhn(folder: Path, split: str, images: NDArray[np.uint8], labels: list[int]) -> Path:
    """As published: images (32, 32, 3, N), labels (N, 1), the variables compressed."""
    path = folder / f"{split}_32x32.mat"
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
    savemat(path, content, do_compression=True)
    return path


def test_svhns_images_stand_upright_and_its_tens_are_zeros(tmp_path: Path) -> None:
    images = noise(3)
    for split, labels in {"train": [10, 1, 9], "test": [2, 10, 10], "extra": [3, 4, 5]}.items():
        write_svhn(tmp_path, split, images, labels)
        data = load_split(recipe_for(tmp_path, size=32), split)
        assert torch.equal(data.images, channels_first(images))
        assert [data.classes[label] for label in data.labels] == [str(label % 10) for label in labels]
        assert len(data.classes) == 10
        assert data.encodings == ("raw",)


def test_svhns_first_axis_is_the_row_and_its_second_the_column(tmp_path: Path) -> None:
    content = np.zeros((32, 32, 3, 2), np.uint8)
    content[5, 7, 2, 1] = 200
    savemat(tmp_path / "test_32x32.mat", {"X": content, "y": np.array([[1], [2]], np.uint8)})
    data = load_split(recipe_for(tmp_path, size=32), "test")
    assert data.images.nonzero().tolist() == [[1, 2, 5, 7]]
    assert data.images[1, 2, 5, 7] == 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "needs the variables X and y; it has .*X"),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))},
            "expected .* N labels, got uint8 .* and 3",
        ),
        ({"X": np.zeros((2, 32, 32, 3), np.uint8), "y": np.ones((2, 1))}, "expected uint8 X"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "expected uint8 X .*got float64"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[0], [1]])}, "expected labels from 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])}, "expected labels from 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array(["a", "b"])}, "expected labels from 1 to 10"),
    ],
)
def test_another_matlab_file_is_refused(content: dict[str, object], reason: str, tmp_path: Path) -> None:
    savemat(tmp_path / "test_32x32.mat", content)
    with pytest.raises(DataError, match=rf"test_32x32\.mat:? {reason}"):
        load_split(recipe_for(tmp_path, size=32), "test")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_matlab_file_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    path = write_svhn(tmp_path, "test", noise(8), [1] * 8)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"test_32x32\.mat"):
        load_split(recipe_for(tmp_path, size=32), "test")


def test_a_file_or_a_split_that_svhn_lacks_is_named(tmp_path: Path) -> None:
    write_svhn(tmp_path, "train", noise(1), [1])
    with pytest.raises(DataError, match=r"test_32x32\.mat is missing"):
        load_split(recipe_for(tmp_path, size=32), "test")
    with pytest.raises(DataError, match="SVHN, whose splits are train, test, extra, not 'val'"):
        load_split(recipe_for(tmp_path, size=32), "val")
    with pytest.raises(DataError, match="has the labels label, not 'y'"):
        load_split(recipe_for(tmp_path, size=32, label_column="y"), "train")
