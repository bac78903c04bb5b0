"""A zip of any number of images, file by file as it comes.

Read front to back, by the headers before each file: the list at a zip's end would be known too late. Names lead
nowhere: they only say what is no image (directories, hidden files, what macOS adds). A zip in the zip is a file that
is no image. Whatever a file claims, no more than an image's bytes are inflated of it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from service.errors import BodyTooLarge, ClarifierError, MalformedZip, TooManyImages, Undecodable
from service.jobs.body import Body
from service.uploads import Upload

ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
LOCAL, DESCRIPTOR, LISTED = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
ENDS = (b"PK\x05\x06", b"PK\x06\x06")
"""What follows the list of files, the second if the zip is a large one."""
END_BYTES = 22
"""What that has at least."""
HEAD = struct.Struct("<2xHH4xIIIHH")
"""Flags, method, CRC, packed and real size, lengths of name and extra fields."""
NEXT = b"PK"
"""What every signature begins with."""
LISTED_HEAD = struct.Struct("<24xHHH12x")
"""Lengths of name, extra fields and comment of a file in the list."""
ENCRYPTED, SIZES_FOLLOW, MASKED = 1, 8, 1 << 13
STORED, DEFLATED = 0, 8
ELSEWHERE = 0xFFFFFFFF
"""A size that stands in the extra field of large files (Zip64)."""
MAX_DESCRIPTOR = 24
DEFLATE_SPARE = 1024
"""What deflating may add to an image that it cannot make smaller, besides a thousandth."""
OTHER_FILES = 1024
"""Files that are no images may be so many more than the images."""

R = TypeVar("R")
Run = Callable[[Callable[[], R]], Awaitable[R]]
"""Runs a function in a thread."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands before a file."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    real: int

    @property
    def is_image(self) -> bool:
        """As far as its name says."""
        *folders, name = self.name.split(b"/")
        return name != b"" and not name.startswith(b".") and b"__MACOSX" not in folders


async def zip_images(
    body: Body, max_images: int, max_bytes: int, run: Run[bytes | None]
) -> AsyncIterator[Upload | ClarifierError]:
    """Its files in their order, an error in the place of one that is too large or damaged.

    Raises what `body` raises, MalformedZip, TooManyImages, and BodyTooLarge for what inflates without an end.
    """
    files = inflated = 0
    while (signature := await body.exactly(4)) == LOCAL:
        files += 1
        if files > 2 * max_images + OTHER_FILES:
            raise TooManyImages(f"a job may hold {max_images} images", limit=max_images)
        entry = await _entry(body)
        content = await _content(body, entry, max_bytes, run)
        inflated += len(content) if isinstance(content, bytes) else 0
        if inflated > body.limit:
            raise BodyTooLarge(f"the files of a zip may have {body.limit} bytes", limit=body.limit)
        if entry.is_image:
            yield content if isinstance(content, ClarifierError) else Upload(content, "")
    await _check_list(body, signature, files)
    await body.exactly(END_BYTES - len(signature))
    await body.skip_rest()


async def _check_list(body: Body, signature: bytes, files: int) -> None:
    """The list at the end names as many files as there were: the zip is whole, and none was taken out of it."""
    listed = 0
    while signature == LISTED:
        listed += 1
        await body.skip(sum(LISTED_HEAD.unpack(await body.exactly(LISTED_HEAD.size))))
        signature = await body.exactly(4)
    if signature not in ENDS or listed != files:
        raise MalformedZip("the list of files is not where it should be, or lists other files")


async def _entry(body: Body) -> Entry:
    flags, method, crc, packed, real, name_length, extra_length = HEAD.unpack(await body.exactly(HEAD.size))
    name, extra = await body.exactly(name_length), await body.exactly(extra_length)
    if flags & (ENCRYPTED | MASKED):
        raise MalformedZip("a file is encrypted")
    if method not in (STORED, DEFLATED):
        raise MalformedZip("a file is packed by another method than deflate")
    if ELSEWHERE in (packed, real) and not flags & SIZES_FOLLOW:
        real, packed = _large_sizes(extra)
    return Entry(name, flags, method, crc, packed, real)


def _large_sizes(extra: bytes) -> tuple[int, int]:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1 and length >= 16 and len(extra) >= 20:
            real, packed = struct.unpack_from("<QQ", extra, 4)
            return real, packed
        extra = extra[4 + length :]
    raise MalformedZip("the size of a file is missing")


async def _content(body: Body, entry: Entry, max_bytes: int, run: Run[bytes | None]) -> bytes | ClarifierError:
    if entry.flags & SIZES_FOLLOW:
        if entry.method == STORED:
            raise MalformedZip("a file is stored without its size before it: write the zip to a file, not to a stream")
        return await _inflate_stream(body, max_bytes, run)
    if not entry.is_image:
        await body.skip(entry.packed)
        return b""
    most = max_bytes if entry.method == STORED else max_bytes + max_bytes // 1000 + DEFLATE_SPARE
    if entry.real > max_bytes or entry.packed > most:
        await body.skip(entry.packed)
        return _too_large(max_bytes, entry.real)
    packed = await body.exactly(entry.packed)
    content = packed if entry.method == STORED else await run(lambda: _inflated(packed, max_bytes))
    if content is None or zlib.crc32(content) != entry.crc:
        return Undecodable("the file is damaged in the zip")
    return content


def _inflated(packed: bytes, max_bytes: int) -> bytes | None:
    """None if it is damaged, or more than `max_bytes`, which its size denies."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, max_bytes + 1)
    except zlib.error:
        return None
    return content if inflater.eof and len(content) <= max_bytes else None


async def _inflate_stream(body: Body, max_bytes: int, run: Run[bytes | None]) -> bytes:
    """A file that is as long as it inflates, and what follows it: its CRC and sizes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = bytearray()
    packed = 0
    while not inflater.eof:
        chunk = await body.some()
        packed += len(chunk)
        room = max_bytes + 1 - len(content)
        piece = await run(lambda chunk=chunk, room=room: _inflate_some(inflater, chunk, room))  # type: ignore[misc]
        if piece is None:
            raise MalformedZip("a file cannot be inflated")
        content += piece
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
    body.unread(inflater.unused_data)
    await _descriptor(body, zlib.crc32(content), packed - len(inflater.unused_data), len(content))
    return bytes(content)


def _inflate_some(inflater: zlib._Decompress, chunk: bytes, room: int) -> bytes | None:
    try:
        return inflater.decompress(chunk, room)
    except zlib.error:
        return None


async def _descriptor(body: Body, crc: int, packed: int, real: int) -> None:
    """Read it: writers leave out its signature, and use long numbers, as they like."""
    ahead = await body.exactly(MAX_DESCRIPTOR + len(NEXT))  # the list of files follows: there are always so many
    for signature in (DESCRIPTOR, b""):
        for numbers in ("<III", "<IQQ"):
            expected = signature + struct.pack(numbers, crc, packed, real)
            if ahead.startswith(expected + NEXT):
                body.unread(ahead[len(expected) :])
                return
    raise MalformedZip("a file does not have the size or the sum that follow it")


def _too_large(max_bytes: int, actual: int | None = None) -> BodyTooLarge:
    return BodyTooLarge(f"an image may have {max_bytes} bytes", limit=max_bytes, actual=actual)
