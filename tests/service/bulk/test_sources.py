"""What there is to do, and the bytes of it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.bulk.places import BulkError, open_place
from service.bulk.sources import Listing, Unreadable, list_source, read_images
from tests.service.bulk.conftest import picture, write_cifar

PLENTY = 10**6


def listing(path: Path, column: str | None = None) -> Listing:
    return list_source(open_place(str(path)), column)


def read(listed: Listing, max_bytes: int = PLENTY) -> list[bytes | int | Unreadable]:
    return list(read_images(listed.source, listed.images, max_bytes))


def test_a_folder_is_all_its_image_files_in_order(photos: Path) -> None:
    listed = listing(photos)
    assert listed.images["path"].to_pylist() == [
        "a.png", "b.jpg", "bad.png", "empty.webp", "more/a.PNG", "more/c.bmp",
    ]  # fmt: skip
    assert listed.left_out == 1
    assert listed.source.keys == ["path"]
    assert read(listed)[0] == picture(0)


def test_a_single_image_is_a_source(photos: Path) -> None:
    listed = listing(photos / "b.jpg")
    assert listed.images["path"].to_pylist() == ["b.jpg"]
    assert read(listed) == [picture(1, "JPEG")]


def test_a_file_that_is_gone_or_too_large_fails_alone(photos: Path) -> None:
    listed = listing(photos)
    (photos / "b.jpg").unlink()
    first, gone, bad, *_ = read(listed, max_bytes=20)
    assert first == len(picture(0))
    assert isinstance(gone, Unreadable)
    assert bad == b"this is no image"


def test_the_rows_of_parquet_files_are_read_in_order_wherever_they_are(tmp_path: Path) -> None:
    write_cifar(tmp_path / "b.parquet", 20)
    write_cifar(tmp_path / "a.parquet", 3)
    listed = listing(tmp_path)
    assert listed.source.column == "img"
    assert listed.source.keys == ["path", "row"]
    assert len(listed.images) == 23
    assert read(listed) == [picture(row) for row in [*range(3), *range(20)]]

    some = listed.images.take([1, 5, 10, 22])
    assert some["row"].to_pylist() == [1, 2, 7, 19]
    assert list(read_images(listed.source, some, PLENTY)) == [picture(row) for row in (1, 2, 7, 19)]


def test_a_column_of_plain_bytes_may_hold_images_and_nulls(tmp_path: Path) -> None:
    values = pa.array([picture(0), None, picture(1)], pa.large_binary())
    pq.write_table(pa.table({"name": ["a", "b", "c"], "photo": values}), tmp_path / "some.parquet")
    listed = listing(tmp_path / "some.parquet", "photo")
    assert read(listed) == [picture(0), b"", picture(1)]
    assert read(listed, max_bytes=9) == [len(picture(0)), b"", len(picture(1))]


def test_a_parquet_file_that_is_gone_fails_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_cifar(tmp_path / f"{name}.parquet", 2)
    listed = listing(tmp_path)
    (tmp_path / "a.parquet").unlink()
    gone, gone_too, *there = read(listed)
    assert isinstance(gone, Unreadable)
    assert isinstance(gone_too, Unreadable)
    assert there == [picture(0), picture(1)]


def test_what_cannot_be_a_source_is_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(BulkError, match="there is no"):
        listing(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(BulkError, match=r"no \.jpg, "):
        listing(tmp_path / "void")
    with pytest.raises(BulkError, match="no parquet files"):
        listing(photos, "img")
    write_cifar(photos / "more.parquet", 2)
    with pytest.raises(BulkError, match="--column COLUMN takes the latter"):
        listing(photos)
    assert listing(photos, "img").source.column == "img"
    with pytest.raises(BulkError, match=r"label holds no images; .* can hold images: img"):
        listing(photos, "label")
    (photos / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(BulkError, match=r"broken\.parquet cannot be read"):
        listing(photos, "img")


def test_of_two_columns_that_may_hold_images_one_must_be_named(tmp_path: Path) -> None:
    images = pa.array([picture(0)])
    pq.write_table(pa.table({"left": images, "right": images}), tmp_path / "pairs.parquet")
    with pytest.raises(BulkError, match=r"--column is needed; .*: left, right"):
        listing(tmp_path)
