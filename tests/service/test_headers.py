"""What is refused before a decoder is called."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from service.errors import (
    Animated,
    ClarifierError,
    ExtremeAspect,
    TooManyPixels,
    Undecodable,
    UnsupportedFormat,
)
from service.headers import MAX_SCANS, read_header
from tests.service.fakes import encoded, green, png

LIMIT = 40_000_000
FORMATS = ("png", "jpeg", "webp", "bmp")
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def with_chunks(*chunks: bytes) -> bytes:
    """A good PNG with `chunks` after its header."""
    data = png(PIXELS)
    return data[:33] + b"".join(chunks) + data[33:]


def png_of(width: int, height: int) -> bytes:
    """A PNG of 10 kB that says it is `width` × `height`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return png(PIXELS)[:8] + header + chunk(b"IDAT", zlib.compress(bytes(10_000), 0)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(PIXELS, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP header of that size."""
    payload = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(9)
    return b"RIFF" + struct.pack("<I", 12 + len(payload)) + b"WEBPVP8L" + struct.pack("<I", len(payload)) + payload


def webp_with_alpha(width: int, height: int) -> bytes:
    """An extended WebP of that size whose alpha is a lossless stream of zeros, without a picture under it."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    alpha = b"\1" + bytes(4095)
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + size + b"ALPH" + struct.pack("<I", len(alpha)) + alpha
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def bmp_of(width: int, height: int, *, compression: int = 0, offset: int = 54, colors: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, compression, 0, 0, 0, colors, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + header + bytes(1000)


@pytest.mark.parametrize("kind", FORMATS)
def test_format_and_size_are_read(kind: str) -> None:
    header = read_header(encoded(PIXELS, kind.upper()), LIMIT)
    assert (header.format, header.width, header.height, header.orientation) == (kind, 7, 5, 1)


FOREIGN = {
    "text": b"just some words, nothing else",
    "pdf": b"%PDF-1.7\n1 0 obj",
    "zip": b"PK\x03\x04" + bytes(40),
    "elf": b"\x7fELF" + bytes(40),
    "mp4": b"\0\0\0\x18ftypisom" + bytes(40),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!doctype html><img>",
    "random": bytes(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8)),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "psd": b"8BPS\0\x01" + bytes(40),
    "fits": b"SIMPLE  =                    T",
    "tiff": b"II*\0" + bytes(40),
    "ico": b"\0\0\x01\0\x01\0" + bytes(40),
    "gif": b"GIF89a" + bytes(40),
    "jpeg2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "avif": b"\0\0\0\x20ftypavif" + bytes(40),
    "heic": b"\0\0\0\x20ftypheic" + bytes(40),
    "bm text": b"BMW is a maker of cars and motorcycles",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_25_and_26_other_formats_are_unsupported_and_no_decoder_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a decoder was called")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.__init__", never)
    with pytest.raises(UnsupportedFormat):
        read_header(FOREIGN[name], LIMIT)


@pytest.mark.parametrize(
    "data",
    [png_of(50_000, 50_000), jpeg_of(65_500, 65_500), webp_of(16_383, 16_383), bmp_of(30_000, -30_000)],
    ids=FORMATS,
)
def test_rows_30_and_39_pixel_bombs_are_refused_from_the_header_alone(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(TooManyPixels) as caught:
        read_header(data, LIMIT)
    assert time.process_time() - started < 1
    assert caught.value.limit == LIMIT
    assert (caught.value.actual or 0) > LIMIT


def test_row_30_the_limit_itself_is_allowed() -> None:
    assert read_header(png(PIXELS), 35).width == 7
    with pytest.raises(TooManyPixels):
        read_header(png(PIXELS), 34)


def test_row_30_the_header_decides_even_where_its_checksum_is_wrong() -> None:
    data = bytearray(png(PIXELS))
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    with pytest.raises(TooManyPixels):
        read_header(bytes(data), LIMIT)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_row_32_a_zlib_bomb_in_a_text_or_profile_is_refused(kind: bytes) -> None:
    bomb = zlib.compress(bytes(50_000_000))
    payload = b"key\0\1\0\0\0" + bomb if kind == b"iTXt" else b"key\0\0" + bomb
    with pytest.raises(Undecodable):
        read_header(with_chunks(chunk(kind, payload)), LIMIT)


def test_row_32_many_small_bombs_are_refused_together() -> None:
    payload = b"key\0\0" + zlib.compress(bytes(1_000_000))
    assert read_header(with_chunks(chunk(b"zTXt", payload)), LIMIT).width == 7
    with pytest.raises(Undecodable):
        read_header(with_chunks(*[chunk(b"zTXt", payload)] * 5), LIMIT)


def test_row_32_too_many_chunks_and_bad_checksums_are_refused() -> None:
    with pytest.raises(Undecodable):
        read_header(with_chunks(chunk(b"tEXt", b"a\0b") * 100_000), LIMIT)
    data = bytearray(png(PIXELS))
    data[-20] ^= 1
    with pytest.raises(Undecodable):
        read_header(bytes(data), LIMIT)


def test_row_33_a_jpeg_of_ten_thousand_scans_is_refused() -> None:
    data = encoded(PIXELS, "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    one = data[scan : data.index(b"\xff", scan + 12)]
    assert read_header(data, LIMIT).width == 7
    with pytest.raises(Undecodable, match=str(MAX_SCANS)):
        read_header(data[:scan] + one * 10_000 + data[scan:], LIMIT)


def exif(orientation: int, *, kind: int = 3, offset: int = 8, order: str = "<") -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(f"{order}HHIHH", 0x0112, kind, 1, orientation, 0)
    return mark + struct.pack(f"{order}HI", 42, offset) + struct.pack(f"{order}H", 1) + entry + bytes(4)


def jpeg_with(application_segments: list[tuple[int, bytes]]) -> bytes:
    data = encoded(PIXELS, "JPEG")
    segments = [bytes([0xFF, marker]) + struct.pack(">H", len(b) + 2) + b for marker, b in application_segments]
    return data[:2] + b"".join(segments) + data[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_row_37_orientations_1_to_8_are_read_and_others_ignored(value: int, order: str) -> None:
    block = exif(value, order=order)
    expected = value if 1 <= value <= 8 else 1
    assert read_header(jpeg_with([(0xE1, b"Exif\0\0" + block)]), LIMIT).orientation == expected
    assert read_header(with_chunks(chunk(b"eXIf", block)), LIMIT).orientation == expected


@pytest.mark.parametrize(
    "block",
    [b"", b"II", b"XX*\0" + bytes(20), exif(6, offset=2**32 - 1), exif(6, offset=4), exif(6, kind=4), exif(6)[:14]],
    ids=["empty", "cut", "no order", "far", "loop", "64-bit kind", "cut entry"],
)
def test_row_33_broken_exif_is_ignored(block: bytes) -> None:
    assert read_header(jpeg_with([(0xE1, b"Exif\0\0" + block)]), LIMIT).orientation == 1


def test_row_33_metadata_never_reach_the_decoder() -> None:
    profile = [(0xE2, b"ICC_PROFILE\0" + bytes(65_000))] * 150  # 10 MB
    header = read_header(jpeg_with([*profile, (0xE1, b"Exif\0\0" + exif(6)), (0xFE, b"canary")]), LIMIT)
    assert len(header.data) < 2000
    assert b"canary" not in header.data
    assert header.orientation == 6
    assert b"canary" not in read_header(with_chunks(chunk(b"tEXt", b"a\0canary")), LIMIT).data


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (png_of(0, 0), Undecodable),
        (png_of(0, 5), Undecodable),
        (jpeg_of(5, 0), Undecodable),
        (bmp_of(0, 4), Undecodable),
        (bmp_of(-4, 4), Undecodable),
        (png_of(1, 10_000), ExtremeAspect),
        (png_of(51, 1), ExtremeAspect),
        (png_of(2**31, 1), TooManyPixels),
        (png_of(2**31, 2**31), TooManyPixels),
    ],
)
def test_row_34_degenerate_sizes(data: bytes, error: type[ClarifierError]) -> None:
    with pytest.raises(error):
        read_header(data, LIMIT)


def test_row_34_one_pixel_and_fifty_to_one_are_fine() -> None:
    assert read_header(png(PIXELS[:1, :1]), LIMIT).width == 1
    assert read_header(png(green(50)[:1]), LIMIT).width == 50


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_row_35_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 90, 200)]
    data = encoded(np.zeros((4, 4, 3), np.uint8), kind, save_all=True, append_images=frames)
    with pytest.raises(Animated):
        read_header(data, LIMIT)


@pytest.mark.parametrize(
    "data",
    [
        bmp_of(4, 4, compression=1),
        bmp_of(4000, 4000, compression=2),
        bmp_of(4, 4, offset=2**31),
        bmp_of(100, 100),
        webp_of(20, 20)[:20],
        b"RIFF" + struct.pack("<I", 4) + b"WEBP",
    ],
    ids=["rle8", "rle4", "far offset", "short", "short webp", "empty webp"],
)
def test_row_39_bmp_and_webp_bombs_are_refused(data: bytes) -> None:
    with pytest.raises(Undecodable):
        read_header(data, LIMIT)


@pytest.mark.parametrize("kind", FORMATS)
def test_row_28_an_image_cut_at_any_byte_is_refused(kind: str) -> None:
    data = encoded(PIXELS, kind.upper())
    for length in range(18, len(data)):
        with pytest.raises(Undecodable):
            read_header(data[:length], LIMIT)


def test_row_33_scans_are_bounded_by_the_pixels_that_they_pass_over() -> None:
    progressive = encoded(np.zeros((100, 100, 3), np.uint8), "JPEG", progressive=True)
    scans = progressive.count(b"\xff\xda")
    assert scans > 5
    enough = scans * 100 * 100 // 10
    assert read_header(progressive, enough).width == 100
    repeated = progressive.replace(b"\xff\xd9", progressive[progressive.rindex(b"\xff\xda") : -2] * 10 + b"\xff\xd9")
    assert read_header(repeated, LIMIT).width == 100
    with pytest.raises(Undecodable, match="scans"):
        read_header(repeated, enough)
