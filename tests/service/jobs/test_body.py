"""A body read in pieces, whatever the pieces it comes in."""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import httpx
import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClarifierError,
    ClientLeft,
    EmptyBody,
    MalformedMultipart,
    MalformedZip,
    TooManyImages,
    WrongField,
)
from service.jobs.body import Body
from service.jobs.forms import form_images
from service.jobs.zips import zip_images
from service.uploads import Upload

R = TypeVar("R")
FILES = st.lists(st.binary(max_size=300), max_size=6)
PIECES = st.lists(st.integers(1, 200), min_size=1, max_size=8)
LIMIT = 100_000


def body_of(data: bytes, sizes: list[int], malformed: type[ClarifierError], *, limit: int = LIMIT) -> Body:
    """A body that comes in pieces of these sizes, over and over, and then ends."""

    def pieces() -> Iterator[dict[str, Any]]:
        position, turn = 0, 0
        while position < len(data):
            size = sizes[turn % len(sizes)]
            yield {"type": "http.request", "body": data[position : position + size], "more_body": True}
            position, turn = position + size, turn + 1
        yield {"type": "http.request", "body": b"", "more_body": False}

    messages = pieces()

    async def receive() -> dict[str, Any]:
        return next(messages)

    return Body(Request({"type": "http", "headers": []}, receive), limit, 10, malformed)


def all_of(images: AsyncIterator[Upload | ClarifierError]) -> list[bytes | str]:
    """The bytes of each image, or the code of its error."""

    async def read() -> list[bytes | str]:
        return [image.data if isinstance(image, Upload) else image.code async for image in images]

    return asyncio.run(read())


async def run(function: Callable[[], R]) -> R:
    return function()


def read_zip(
    data: bytes, sizes: list[int] | None = None, max_images: int = 100, limit: int = LIMIT
) -> list[bytes | str]:
    body = body_of(data, sizes or [50], MalformedZip, limit=limit)
    return all_of(zip_images(body, max_images, 200, run))


def form(files: list[bytes], name: str = "images") -> tuple[bytes, bytes]:
    request = httpx.Request("POST", "http://x", files=[(name, ("x.png", data)) for data in files])
    return request.read(), request.headers["content-type"].partition("boundary=")[2].encode()


def expected(files: list[bytes]) -> list[bytes | str]:
    return [data if len(data) <= 200 else "body_too_large" for data in files]


class OneWay(io.BytesIO):
    """What a zip is written to by those who cannot go back."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise OSError

    def seek(self, *_: int) -> int:
        raise OSError


def zipped(
    files: list[bytes], method: int = ZIP_DEFLATED, file: io.BytesIO | None = None, large: bool = False
) -> bytes:
    file = file or io.BytesIO()
    with ZipFile(file, "w", method) as archive:
        for number, data in enumerate(files):
            entry = ZipInfo(f"{number}.png")
            entry.compress_type = method
            with archive.open(entry, "w", force_zip64=large) as writer:
                writer.write(data)
    return file.getvalue()


@given(FILES, PIECES)
def test_a_form_gives_each_image_in_its_order(files: list[bytes], sizes: list[int]) -> None:
    files = files or [b""]
    body, boundary = form(files)
    assert all_of(form_images(body_of(body, sizes, MalformedMultipart), boundary, 200)) == expected(files)


@given(FILES, PIECES, st.sampled_from([ZIP_STORED, ZIP_DEFLATED]), st.booleans())
def test_a_zip_gives_each_file_in_its_order(files: list[bytes], sizes: list[int], method: int, large: bool) -> None:
    assert read_zip(zipped(files, method, large=large), sizes) == expected(files)


@given(st.lists(st.binary(max_size=200), max_size=6), PIECES, st.booleans())
def test_so_does_one_that_was_written_to_a_stream(files: list[bytes], sizes: list[int], large: bool) -> None:
    assert read_zip(zipped(files, file=OneWay(), large=large), sizes) == files


@given(st.binary(max_size=400), PIECES)
def test_what_is_no_zip_is_refused(data: bytes, sizes: list[int]) -> None:
    with suppress(MalformedZip, EmptyBody):
        assert read_zip(data, sizes) == []  # it is the end of a zip without files
        assert data.startswith(b"PK")


@given(st.data())
def test_a_damaged_or_truncated_zip_is_refused_or_an_error_in_its_place(data: st.DataObject) -> None:
    whole = bytearray(zipped([b"one" * 30, b"two" * 30], file=data.draw(st.sampled_from([OneWay, io.BytesIO]))()))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    with suppress(MalformedZip, BodyTooLarge):
        assert len(read_zip(bytes(whole))) <= 2
    end = data.draw(st.integers(0, len(whole) - 23))
    with pytest.raises((MalformedZip, EmptyBody, BodyTooLarge)):
        read_zip(zipped([b"one" * 30])[:end] if end < 100 else bytes(whole[:end]))


def test_a_bomb_is_an_error_in_its_place_where_its_size_stands_before_it() -> None:
    assert read_zip(zipped([b"a", bytes(50_000_000), b"b"])) == [b"a", "body_too_large", b"b"]
    with pytest.raises(BodyTooLarge):
        read_zip(zipped([b"a", bytes(50_000_000), b"b"], file=OneWay()))
    lies = bytearray(zipped([bytes(50_000_000)]))
    lies[22:26] = (100).to_bytes(4, "little")  # its real size
    lies[14:18] = zlib.crc32(bytes(100)).to_bytes(4, "little")
    assert read_zip(bytes(lies)) == ["body_too_large" if len(lies) > 1400 else "undecodable"]
    with pytest.raises(BodyTooLarge):  # many small ones
        read_zip(zipped([bytes(200)] * 30), limit=5000)


def test_what_cannot_be_read_front_to_back_is_refused() -> None:
    with pytest.raises(MalformedZip, match="stored without its size"):
        read_zip(zipped([b"a"], ZIP_STORED, OneWay()))
    encrypted = bytearray(zipped([b"a"]))
    encrypted[6] |= 1
    with pytest.raises(MalformedZip, match="encrypted"):
        read_zip(bytes(encrypted))
    other = bytearray(zipped([b"a"]))
    other[8] = 14
    with pytest.raises(MalformedZip, match="another method"):
        read_zip(bytes(other))
    with pytest.raises(MalformedZip, match="list"):
        read_zip(zipped([b"a"])[:-22] + b"x" * 22)
    with pytest.raises(TooManyImages):
        read_zip(zipped([b""] * 1100), max_images=10)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"--b\r\nContent-Disposition: form-data; name=images; filename=a\r\n\r\nx\r\n--b", MalformedMultipart),
        (b"--b\r\nContent-Disposition: form-data; name=images; filename=a\r\n\r\nx\r\n--bxx", MalformedMultipart),
        (b"--b\r\nContent-Disposition: form-data; name=images\r\n\r\nx\r\n--b--", MalformedMultipart),
        (b"--b\r\nContent-Disposition: form-data; name=other; filename=a\r\n\r\nx\r\n--b--", WrongField),
        (b"--b\r\n" + b"x" * 10_000, MalformedMultipart),
        (b"x--b\r\n", MalformedMultipart),
        (b"--b", MalformedMultipart),
        (b"", EmptyBody),
    ],
)
def test_a_malformed_form_is_refused(message: bytes, error: type[ClarifierError]) -> None:
    with pytest.raises(error):
        all_of(form_images(body_of(message, [7], MalformedMultipart), b"b", 200))


def test_too_many_bytes_are_refused_before_or_when_they_come() -> None:
    body, boundary = form([b"x" * 150] * 10)
    with pytest.raises(BodyTooLarge):
        all_of(form_images(body_of(body, [100], MalformedMultipart, limit=1000), boundary, 200))
    with pytest.raises(BodyTooLarge):
        Body(Request({"type": "http", "headers": [(b"content-length", b"1001")]}), 1000, 10, MalformedZip)


def test_a_body_that_does_not_come_is_refused() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def left() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    for receive, error in ((never, BodyTooSlow), (left, ClientLeft)):
        body = Body(Request({"type": "http", "headers": []}, receive), LIMIT, 0.05, MalformedZip)
        with pytest.raises(error):
            asyncio.run(body.exactly(1))


def test_a_body_that_trickles_is_refused() -> None:
    async def trickle() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    body = Body(Request({"type": "http", "headers": []}, trickle), LIMIT, 0.2, MalformedZip)
    with pytest.raises(BodyTooSlow):
        asyncio.run(body.exactly(LIMIT))
