"""A zip that others can read."""

from __future__ import annotations

import io
from zipfile import ZIP_STORED, ZipFile

from hypothesis import given
from hypothesis import strategies as st

from service.archives import Archive

FILES = st.dictionaries(st.from_regex(r"[0-9]{1,3}\.(png|json)", fullmatch=True), st.binary(max_size=3000), max_size=8)


def archive(files: dict[str, bytes]) -> Archive:
    made = Archive()
    for name, data in files.items():
        made.add(name, data)
    return made


@given(FILES)
def test_what_goes_in_comes_out_in_its_order_and_is_not_deflated(files: dict[str, bytes]) -> None:
    with ZipFile(io.BytesIO(archive(files).finish())) as read:
        assert read.testzip() is None
        assert [(entry.filename, read.read(entry)) for entry in read.infolist()] == list(files.items())
        assert all(entry.compress_type == ZIP_STORED for entry in read.infolist())


@given(FILES)
def test_the_size_is_that_of_the_bytes_so_far_and_the_list_at_the_end_is_short(files: dict[str, bytes]) -> None:
    made = archive(files)
    held = made.size
    assert held >= sum(map(len, files.values()))
    assert held <= len(made.finish()) <= held + 100 * len(files) + 100


@given(FILES, st.lists(st.booleans(), min_size=8, max_size=8))
def test_what_is_taken_in_between_and_the_rest_are_the_whole(files: dict[str, bytes], taken: list[bool]) -> None:
    made, pieces = Archive(), list[bytes]()
    for (name, data), take in zip(files.items(), taken, strict=False):
        made.add(name, data)
        if take:
            pieces.append(made.take())
    assert b"".join([*pieces, made.finish()]) == archive(files).finish()


def test_the_same_files_make_the_same_zip_and_can_be_read_when_unpacked() -> None:
    data = archive({"0.png": b"picture"}).finish()
    assert data == archive({"0.png": b"picture"}).finish()
    with ZipFile(io.BytesIO(data)) as read:
        assert read.infolist()[0].external_attr >> 16 == 0o644
