"""Paths and URIs, as pyarrow opens them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from service.bulk.places import BulkError, open_place


def test_a_path_and_a_uri_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (open_place("here") / "deep" / "file").write(b"content")

    assert (tmp_path / "here" / "deep" / "file").read_bytes() == b"content"
    by_uri = open_place(f"file://{tmp_path}/here/")
    assert by_uri.path == open_place("here").path
    assert by_uri.names() == ["deep/file"]
    assert (by_uri / "deep/file").read() == b"content"


def test_nothing_is_below_a_place_that_is_not_there(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "none"))
    assert place.kind() == fs.FileType.NotFound
    assert place.names() == []


def test_a_file_appears_as_a_whole_in_the_place_of_another(tmp_path: Path) -> None:
    place = open_place(str(tmp_path)) / "file"
    place.write_whole(b"old")
    place.write_whole(b"new")
    assert place.read() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_uri_that_nothing_reads_is_refused_in_one_line() -> None:
    with pytest.raises(BulkError, match=r"^nosuch://... cannot be opened: [^\n]+$"):
        open_place("nosuch://bucket/key")
