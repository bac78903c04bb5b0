"""What an encoded image says about itself, read without a decoder: format, size, orientation, completeness.

Whatever could make a decoder work hard (size, scans, frames, chunks, run-length bombs) is refused here, in
time that does not depend on the number of pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from service.errors import Animated, ExtremeAspect, TooManyPixels, Undecodable, UnsupportedFormat

MAX_CHUNKS = 10_000
"""Of a PNG or WebP. A PNG of 10 MiB in the usual 8 KiB chunks has 1,300."""
MAX_SCANS = 64
"""Of a JPEG; each costs a pass over all pixels. Usual progressive files have about 10."""
MAX_SCANNED_IMAGES = 10
"""Of a JPEG: scans × pixels, in images of the most pixels that are allowed."""
MAX_INFLATED_BYTES = 4 << 20
"""Of a PNG's compressed texts and color profile together."""
MAX_ASPECT = 50
"""Of the long to the short side: beyond it a center crop would throw almost everything away."""
BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)


@dataclass(frozen=True, slots=True)
class Header:
    """`data` is what the decoder is given: the file, for JPEG and PNG without its metadata."""

    format: str
    width: int
    height: int
    orientation: int
    """EXIF, 1 to 8; 1 where there is none or an invalid one."""
    data: bytes


def read_header(data: bytes, max_pixels: int) -> Header:
    """The header of a complete JPEG, PNG, WebP or BMP file.

    Raises UnsupportedFormat by the first bytes, TooManyPixels and ExtremeAspect as soon as the size is known,
    Animated, and Undecodable for what is damaged, truncated or made to exhaust a decoder.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data, max_pixels)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data, max_pixels)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data, max_pixels)
        if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in BMP_HEADER_SIZES:
            return _bmp(data, max_pixels)
    except (struct.error, IndexError) as error:
        raise Undecodable("the image is truncated") from error
    raise UnsupportedFormat("JPEG, PNG, WebP and BMP are supported")


def _check_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if width * height > max_pixels:
        raise TooManyPixels(
            f"{width} × {height} pixels are more than {max_pixels}", limit=max_pixels, actual=width * height
        )
    if not width or not height:
        raise Undecodable("the image has no pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ExtremeAspect(f"one side may be at most {MAX_ASPECT} times the other")
    return width, height


# --- JPEG: segments, then entropy-coded scans (ITU-T T.81, annex B)

_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_PAYLOAD = frozenset(range(0xD0, 0xD8)) | {0x01}
_KEPT_APPLICATION_SEGMENTS = (0xE0, 0xEE)  # JFIF, and Adobe's: it says how the colors are to be read
_END_OF_ENTROPY = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _jpeg(data: bytes, max_pixels: int) -> Header:
    width = height = scans = 0
    orientation = 1
    kept = [data[:2]]
    position = 2
    while True:
        marker, payload, end = _jpeg_segment(data, position)
        if marker == 0xD9:
            break
        if marker in _FRAME_MARKERS:
            if width:
                raise Undecodable("the image has two frames")
            height, width = struct.unpack_from(">HH", payload, 1)
            _check_size(width, height, max_pixels)
        elif marker == 0xE1 and payload.startswith(b"Exif\0\0"):
            orientation = _orientation(payload[6:])
        elif marker == 0xDA:
            scans += 1
            end = _end_of_scan(data, end)
        if marker == 0xFE or (0xE0 <= marker <= 0xEF and marker not in _KEPT_APPLICATION_SEGMENTS):
            position = end
            continue
        kept.append(data[position:end])
        position = end
    if not scans or scans > MAX_SCANS:
        raise Undecodable(f"an image has 1 to {MAX_SCANS} scans, this one {scans}")
    if scans * width * height > MAX_SCANNED_IMAGES * max_pixels:
        raise Undecodable(f"{scans} scans are too many for an image of this size")
    return Header("jpeg", width, height, orientation, b"".join([*kept, b"\xff\xd9"]))


def _jpeg_segment(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Marker, payload and end of the segment at `position`; fill bytes before the marker are allowed."""
    if data[position] != 0xFF:
        raise Undecodable("the image is damaged between two segments")
    while data[position] == 0xFF:
        position += 1
    marker = data[position]
    position += 1
    if marker == 0xD9 or marker in _NO_PAYLOAD:
        return marker, b"", position
    (length,) = struct.unpack_from(">H", data, position)
    if length < 2 or position + length > len(data):
        raise Undecodable("the image is truncated")
    return marker, data[position + 2 : position + length], position + length


def _end_of_scan(data: bytes, position: int) -> int:
    """Where the entropy-coded data from `position` ends: at the next marker that is not a restart."""
    found = _END_OF_ENTROPY.search(data, position)
    if found is None:
        raise Undecodable("the image is truncated")
    return found.start()


# --- PNG: chunks (ISO/IEC 15948)


_CHUNKS_OF_THE_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _png(data: bytes, max_pixels: int) -> Header:
    if data[12:16] != b"IHDR":
        raise Undecodable("the image does not start with its header")
    width, height = struct.unpack_from(">II", data, 16)
    _check_size(width, height, max_pixels)
    orientation = 1
    inflatable = MAX_INFLATED_BYTES
    kept = [data[:8]]
    for kind, start, end in _png_chunks(data):
        payload = data[start + 8 : end - 4]
        if kind in _CHUNKS_OF_THE_PICTURE:
            kept.append(data[start:end])
        elif kind == b"acTL":
            raise Animated
        elif kind == b"eXIf":
            orientation = _orientation(payload)
        else:
            inflatable -= _inflated_bytes(_compressed_part(kind, payload), inflatable)
    if sum(chunk[4:8] == b"IHDR" for chunk in kept) != 1:
        raise Undecodable("the image has two headers")
    return Header("png", width, height, orientation, b"".join(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk up to IEND.

    Raises Undecodable if a checksum is wrong or there are too many chunks, struct.error if IEND never comes.
    """
    start = 8
    for _ in range(MAX_CHUNKS):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 12 + length
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[start + 4 : end - 4]) != checksum:
            raise Undecodable("a checksum of the image is wrong")
        kind = data[start + 4 : start + 8]
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end
    raise Undecodable("the image has too many chunks")


def _compressed_part(kind: bytes, payload: bytes) -> bytes:
    """The zlib stream inside a text or profile chunk; nothing for other chunks."""
    _, _, rest = payload.partition(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        return rest[1:]
    if kind == b"iTXt" and rest[:1] == b"\1":
        return rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return b""


def _inflated_bytes(compressed: bytes, limit: int) -> int:
    """How many bytes come out; raises Undecodable at the first one over `limit`."""
    try:
        inflated = len(zlib.decompressobj().decompress(compressed, limit + 1))
    except zlib.error:
        return 0
    if inflated > limit:
        raise Undecodable("the metadata of the image are too large")
    return inflated


# --- WebP: RIFF chunks (RFC 9649)


def _webp(data: bytes, max_pixels: int) -> Header:
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise Undecodable("the image is truncated")
    size: tuple[int, int] | None = None
    orientation = 1
    for kind, payload in _webp_chunks(data[: length + 8]):
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and payload[0] & 0x02):
            raise Animated
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            here = _check_size(*_webp_size(kind, payload), max_pixels)
            if size is not None and size != here:
                raise Undecodable("the image contradicts itself about its size")
            size = here
        elif kind == b"EXIF":
            orientation = _orientation(payload.removeprefix(b"Exif\0\0"))
    if size is None:
        raise Undecodable("the image has no picture in it")
    return Header("webp", *size, orientation, data)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 12
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data):
            raise Undecodable("the image is truncated")
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise Undecodable("the image has too many chunks")


def _webp_size(kind: bytes, payload: bytes) -> tuple[int, int]:
    if kind == b"VP8X":
        return 1 + int.from_bytes(payload[4:7], "little"), 1 + int.from_bytes(payload[7:10], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", payload, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", payload, 6)
    return width & 0x3FFF, height & 0x3FFF


# --- BMP: one header, then rows of pixels


def _bmp(data: bytes, max_pixels: int) -> Header:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, depth = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, depth, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in (0, 3):
        raise Undecodable("only uncompressed BMP images are accepted")
    height = abs(height)
    if width < 0:
        raise Undecodable("the image has a negative width")
    _check_size(width, height, max_pixels)
    row_bytes = (width * depth + 31) // 32 * 4
    if offset + row_bytes * height > len(data):
        raise Undecodable("the image is truncated")
    return Header("bmp", width, height, 1, data)


# --- EXIF: one tag of the first directory, and nothing else

_ORIENTATION_TAG = 0x0112


def _orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in a block of EXIF (TIFF 6.0); 1 if it is absent, invalid or unreadable."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        magic, directory = struct.unpack_from(f"{order}HI", exif, 2)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, min(directory + 2 + 12 * count, len(exif)), 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if magic == 42 and kind == 3 and values == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
