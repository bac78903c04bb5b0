"""The recipe, pinned; and what damaged files do to it."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import (
    Animated,
    ClarifierError,
    ExtremeAspect,
    TooManyPixels,
    Undecodable,
    UnsupportedFormat,
)
from service.headers import read_header
from service.images import (
    BYTES_PER_DECODED_PIXEL,
    BYTES_PER_JPEG_PIXEL,
    DECODERS,
    QUICK_BYTES,
    change_original,
    decode_if_quick,
    decode_image,
    encode_image,
    to_bytes,
    to_floats,
)
from service.work import Pixels
from tests.service.fakes import encoded, png
from tests.service.test_headers import (
    FORMATS,
    bmp_of,
    chunk,
    exif,
    jpeg_of,
    jpeg_with,
    png_of,
    webp_of,
    webp_with_alpha,
)

LIMIT = 1_000_000
RNG = np.random.default_rng(0)
NOISE: Pixels = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
LOSSLESS = {"PNG": {}, "BMP": {}, "WEBP": {"lossless": True}}


def decoded(data: bytes, height: int, width: int) -> Pixels:
    return decode_image(data, (height, width), LIMIT).pixels


def photo(side: int = 64) -> Pixels:
    """Smooth, colorful, asymmetric: what a photograph is to a resize."""
    y, x = np.mgrid[0:side, 0:side] / side
    planes = [np.sin(3 * x + y), np.cos(2 * y) * x, (x + y) / 2]
    return np.stack([(127 * plane + 128).clip(0, 255) for plane in planes], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_image_of_the_models_size_comes_through_bit_exact(kind: str) -> None:
    assert (decoded(encoded(NOISE, kind, **LOSSLESS[kind]), 12, 16) == NOISE).all()


def test_a_small_upload_is_decoded_at_once_to_the_same_pixels() -> None:
    small = png(photo(64))
    quick = decode_if_quick(small, (12, 16), LIMIT)
    assert quick is not None
    assert (quick.pixels == decoded(small, 12, 16)).all()
    inflatable = small[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) + small[33:]
    for slow in (png(photo(65)), small + bytes(QUICK_BYTES), inflatable):
        assert decode_if_quick(slow, (12, 16), LIMIT) is None
        assert decoded(slow, 12, 16).shape == (12, 16, 3)
    with pytest.raises(UnsupportedFormat):
        decode_if_quick(b"no image", (12, 16), LIMIT)


def test_the_crop_is_centered_and_has_the_models_aspect() -> None:
    wide = np.concatenate([np.zeros_like(NOISE), NOISE, np.full_like(NOISE, 255)], axis=1)
    assert (decoded(png(wide), 12, 16) == NOISE).all()
    tall = np.concatenate([np.zeros_like(NOISE), NOISE, np.full_like(NOISE, 255)], axis=0)
    assert (decoded(png(tall), 12, 16) == NOISE).all()


def test_the_resize_is_anti_aliased() -> None:
    checkerboard = np.indices((64, 64)).sum(0) % 2 * 255
    pixels = decoded(png(np.repeat(checkerboard[..., None], 3, 2).astype(np.uint8)), 8, 8)
    assert abs(pixels.astype(int) - 127).max() <= 2  # a sparse filter would answer all black or all white


def test_row_40_a_hidden_image_in_the_sampled_pixels_does_not_show() -> None:
    cover = np.full((80, 80, 3), 230, np.uint8)
    cover[5::10, 5::10] = 0  # exactly what a nearest-neighbor resize to 8 × 8 would pick
    assert decoded(png(cover), 8, 8).min() > 200


@pytest.mark.parametrize("value", [0, 255, 77])
def test_row_40_a_single_color_stays_that_color(value: int) -> None:
    flat = np.full((50, 70, 3), value, np.uint8)
    assert (decoded(png(flat), 8, 8) == value).all()


@pytest.mark.parametrize("side", [1, 3, 8, 800])
def test_row_41_any_size_is_brought_to_the_models(side: int) -> None:
    first, second = (decode_image(png(photo(side)), (8, 8), LIMIT) for _ in range(2))
    assert first.pixels.shape == (8, 8, 3)
    assert (first.pixels == second.pixels).all()
    assert (first.format, first.width, first.height) == ("png", side, side)


def test_row_42_three_encodings_give_nearly_the_same_pixels() -> None:
    exact = decoded(png(photo()), 16, 16).astype(int)
    jpeg = decoded(encoded(photo(), "JPEG", quality=95), 16, 16)
    webp = decoded(encoded(photo(), "WEBP", quality=95), 16, 16)
    assert abs(jpeg - exact).max() <= 4
    assert abs(webp - exact).max() <= 6


def grey16() -> NDArray[np.uint16]:
    return np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)


def test_row_36_sixteen_bit_grey_keeps_its_high_byte() -> None:
    expected = (grey16() >> 8).astype(np.uint8)
    assert (decoded(png(grey16()), 2, 3) == expected[..., None]).all()


def test_row_36_a_transparent_sixteen_bit_grey_is_white() -> None:
    data = png(grey16())
    transparent = data[:33] + chunk(b"tRNS", struct.pack(">H", 256)) + data[33:]
    expected = (grey16() >> 8).astype(np.uint8)
    expected[0, 2] = 255
    assert (decoded(transparent, 2, 3) == expected[..., None]).all()


def test_row_36_sixteen_bit_color_keeps_its_high_byte() -> None:
    samples = RNG.integers(0, 65536, (2, 3, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    import zlib

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    for transparency in (b"", chunk(b"tRNS", struct.pack(">HHH", 1, 2, 40000))):
        data = png_of(1, 1)[:8] + header + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        assert (decoded(data, 2, 3) == samples >> 8).all()


def test_row_36_grey_and_one_bit_become_rgb() -> None:
    grey = RNG.integers(0, 256, (4, 4), dtype=np.uint8)
    assert (decoded(png(grey), 4, 4) == grey[..., None]).all()
    bits = grey > 127
    file = io.BytesIO()
    Image.fromarray(bits).save(file, "PNG")
    assert (decoded(file.getvalue(), 4, 4) == bits[..., None] * 255).all()


def test_row_36_alpha_is_laid_over_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert abs(decoded(encoded(rgba, kind, **options), 1, 3).astype(int) - expected).max() <= 1
    grey_alpha = np.array([[[0, 255], [0, 0]]], np.uint8)
    assert decoded(png(grey_alpha), 1, 2).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_row_36_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    plain, transparent = io.BytesIO(), io.BytesIO()
    image.save(plain, "PNG")
    image.save(transparent, "PNG", transparency=1)
    assert decoded(plain.getvalue(), 1, 2).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert decoded(transparent.getvalue(), 1, 2).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("side", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("sampling", [0, 1, 2, None])
@pytest.mark.parametrize("quality", [10, 75, 100])
def test_plain_jpegs_have_the_pixels_that_pillow_gives(side: int, sampling: int | None, quality: int) -> None:
    noisy = np.random.default_rng(side).integers(0, 256, (side, side + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(noisy).convert("L" if sampling is None else "RGB")
    chroma = {} if sampling is None else {"subsampling": sampling}
    for progressive in (False, True):
        for restarts in (0, 1):
            options = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restarts, **chroma}
            file = encoded(np.asarray(picture), "JPEG", **options)
            with Image.open(io.BytesIO(file)) as opened:
                wanted = np.asarray(opened.convert("RGB"))
            assert (decoded(file, side, side + 1) == wanted).all()


@pytest.mark.parametrize("function", ["decode_jpeg_header", "decode_jpeg"])
@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_what_only_pillow_reads_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, function: str, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    photograph = encoded(photo(), "JPEG")
    monkeypatch.setattr(f"simplejpeg.{function}", refuse)
    with Image.open(io.BytesIO(photograph)) as opened:
        assert (decoded(photograph, opened.height, opened.width) == np.asarray(opened)).all()


def test_a_size_that_is_not_the_headers_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("it takes memory for a size that was not checked")

    photograph = encoded(photo(), "JPEG")
    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda *_, **__: (65_500, 65_500, "YCbCr", "420"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", decode)
    assert decoded(photograph, 16, 16).shape == (16, 16, 3)


def test_row_36_cmyk_jpegs_are_read_inverted_as_adobe_writes_them() -> None:
    red = encoded_cmyk(0, 255, 255, 0)
    assert b"Adobe" in red
    assert abs(decoded(red, 16, 16).astype(int) - [255, 0, 0]).max() < 8


def test_row_36_ycck_jpegs_are_read_inverted_too() -> None:
    """Y, Cb and Cr hold 255 minus C, M and Y, which like K are 255 where there is no ink."""
    white, black = [255] * 3, [0] * 3
    for stored, expected in (((0, 128, 128, 255), white), ((255, 128, 128, 255), black), ((0, 128, 128, 0), black)):
        data = encoded_cmyk(*(255 - sample for sample in stored))
        place = data.index(b"Adobe") + 11
        ycck = data[:place] + b"\2" + data[place + 1 :]
        assert abs(decoded(ycck, 16, 16).astype(int) - expected).max() < 8


def encoded_cmyk(*color: int) -> bytes:
    """A JPEG of one CMYK color, as Pillow writes it: inverted, with Adobe's marker."""
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), color).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_row_37_orientation_is_applied(value: int) -> None:
    from PIL import ImageOps

    block = exif(value)
    data = png(NOISE)
    data = data[:33] + chunk(b"eXIf", block) + data[33:]
    reference = Image.open(io.BytesIO(encoded(NOISE, "PNG", exif=b"Exif\0\0" + block)))
    expected = np.asarray(ImageOps.exif_transpose(reference) if value <= 8 else Image.fromarray(NOISE))
    result = decode_image(data, expected.shape[:2], LIMIT)
    assert (result.pixels == expected).all()


@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_row_37_orientation_is_applied_in_every_format_that_has_one(
    kind: str, options: dict[str, Any], value: int
) -> None:
    from PIL import ImageOps

    data = encoded(NOISE, kind, exif=b"Exif\0\0" + exif(value), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert (decode_image(data, expected.shape[:2], LIMIT).pixels == expected).all()


@pytest.mark.parametrize("profile", [b"", b"broken", bytes(3000)])
def test_row_38_color_profiles_are_ignored(profile: bytes) -> None:
    jpeg = jpeg_with([(0xE2, b"ICC_PROFILE\0\x01\x01" + profile)])
    assert (decoded(jpeg, 5, 7) == decoded(jpeg_with([]), 5, 7)).all()
    assert (decoded(encoded(NOISE, "PNG", icc_profile=profile), 12, 16) == NOISE).all()
    webp = encoded(NOISE, "WEBP", lossless=True, icc_profile=profile)
    assert (decoded(webp, 12, 16) == NOISE).all()


def test_row_27_polyglots_are_the_image() -> None:
    for kind in ("PNG", "JPEG"):
        data = encoded(NOISE, kind) + b"PK\x03\x04 canary"
        pixels = decoded(data, 12, 16)
        assert (pixels == decoded(encoded(NOISE, kind), 12, 16)).all()
    with pytest.raises(ClarifierError) as caught:
        decode_image(b"GIF89a" + encoded(NOISE, "PNG"), (8, 8), LIMIT)
    assert caught.value.status == 415


DAMAGED_ERRORS = (Undecodable, Animated, ExtremeAspect, TooManyPixels, UnsupportedFormat)
WHOLE = {kind: encoded(NOISE, kind.upper()) for kind in FORMATS}
WHOLE["progressive"] = encoded(NOISE, "JPEG", progressive=True)
WHOLE["lossless"] = encoded(NOISE, "WEBP", lossless=True)
WHOLE["palette"] = encoded(np.asarray(Image.fromarray(NOISE).convert("L")), "BMP")


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_row_29_flipped_bits_give_an_image_or_422_and_never_a_warning(kind: str) -> None:
    """Ten thousand damaged files in all, each with one to eight flipped bits behind what names its format."""
    rng = np.random.default_rng(29)
    first_byte = 18 if kind == "bmp" else 4
    for _ in range(-(-10_000 // len(WHOLE))):
        damaged = bytearray(WHOLE[kind])
        for place in rng.integers(first_byte, len(damaged), rng.integers(1, 9)):
            damaged[place] ^= 1 << int(rng.integers(8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                pixels = decoded(bytes(damaged), 8, 8)
            except DAMAGED_ERRORS:
                continue
        assert pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_row_28_no_truncated_file_gives_pixels(kind: str) -> None:
    data = WHOLE[kind]
    for length in range(18, len(data)):
        with pytest.raises(Undecodable):
            decode_image(data[:length], (8, 8), LIMIT)


def test_row_28_a_complete_container_around_truncated_pixels_is_refused() -> None:
    import zlib

    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in NOISE))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 12, 8, 2, 0, 0, 0))
    for part in (rows[: len(rows) // 2], zlib.compress(b"\0" * 100), b""):
        data = png_of(1, 1)[:8] + header + chunk(b"IDAT", part) + chunk(b"IEND", b"")
        with pytest.raises(Undecodable):
            decode_image(data, (8, 8), LIMIT)


@pytest.mark.parametrize(
    "bomb",
    [
        png_of(50_000, 50_000),
        jpeg_of(65_500, 65_500),
        webp_of(16_383, 16_383),
        webp_with_alpha(16_383, 16_383),
        bmp_of(30_000, 30_000),
    ],
    ids=["png", "jpeg", "webp", "alpha", "bmp"],
)
def test_rows_30_and_39_a_refused_bomb_allocates_nothing_and_takes_no_time(bomb: bytes) -> None:
    seconds = []
    for _ in range(5):
        started = time.process_time()
        with pytest.raises(TooManyPixels):
            decode_image(bomb, (8, 8), 40_000_000)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.005
    tracemalloc.start()
    with pytest.raises(TooManyPixels):
        decode_image(bomb, (8, 8), 40_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_row_39_alpha_that_inflates_beyond_the_picture_is_422() -> None:
    with pytest.raises(Undecodable):
        decode_image(webp_with_alpha(16, 16), (8, 8), LIMIT)


def test_row_39_a_bmp_with_an_absurd_palette_is_refused() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 0, 0, 0, 0, 2**28, 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + header + bytes(2000)
    with pytest.raises(Undecodable):
        decode_image(data, (8, 8), LIMIT)
    upside_down = decoded(bmp_of(4, -4), 4, 4)
    assert upside_down.shape == (4, 4, 3)


def test_purified_images_are_rounded_and_clipped() -> None:
    image = np.array([[[-0.5, 0.0, 0.5], [1.0, 1.5, 100.4 / 255]]], np.float32)
    assert to_bytes(image).tolist() == [[[0, 0, 128], [255, 255, 100]]]
    assert (to_bytes(to_floats(NOISE)) == NOISE).all()


def test_every_type_of_answer_can_be_read_back() -> None:
    image = to_floats(NOISE)
    for kind in ("image/png", "image/webp"):
        assert (decoded(encode_image(image, kind), 12, 16) == NOISE).all()
    array = np.load(io.BytesIO(encode_image(image, "application/x-npy")), allow_pickle=False)
    assert array.dtype == np.float32
    assert (array == image).all()


def test_no_change_leaves_the_original_as_it_was() -> None:
    original = RNG.integers(0, 256, (300, 431, 3), dtype=np.uint8)
    assert (change_original(read_header(png(original), LIMIT), np.zeros((8, 8, 3), np.float32)) == original).all()


def test_a_change_is_enlarged_onto_the_crop_only_and_without_seams() -> None:
    original = np.full((700, 900, 3), 100, np.uint8)
    ramp = np.repeat(np.linspace(0, 0.2, 8, dtype=np.float32)[:, None, None], 8, 1).repeat(3, 2)
    changed = change_original(read_header(png(original), LIMIT), ramp).astype(int)
    assert (changed[:, :100] == 100).all()
    assert (changed[:, -100:] == 100).all()
    middle = changed[:, 450, 0]
    assert (middle[0], middle[-1]) == (100, 151)
    steps = np.diff(middle)  # a seam between strips would be a step backwards or a jump
    assert steps.min() >= 0
    assert steps.max() <= 1


def test_a_change_of_a_turned_photograph_is_laid_on_its_upright_pixels() -> None:
    data = png(NOISE)
    turned = data[:33] + chunk(b"eXIf", exif(6)) + data[33:]
    assert change_original(read_header(turned, LIMIT), np.zeros((4, 4, 3), np.float32)).shape == (16, 12, 3)


MEASURE = """
import sys
from service.images import decode_image, encode_purified
import numpy as np

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

data = open(sys.argv[1], "rb").read()
before = peak()
decode_image(data, (8, 8), 40_000_000)
if sys.argv[2] == "change":
    same = np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)
    encode_purified(*same, data, "image/webp", 40_000_000)
print(peak() - before)
"""


def measured_bytes(path: Path, upload: bytes, what: str) -> int:
    """What a process of its own needs to `decode` it, or to `change` it at its own size too."""
    path.write_bytes(upload)
    command = [sys.executable, "-c", MEASURE, str(path), what]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_decoding_and_changing_take_no_more_memory_than_the_banner_says(tmp_path: Path) -> None:
    side = 2000
    pixels = np.full((side, side, 4), 128, np.uint8)
    pixels[::7, ::3] = 200
    upload = encoded(pixels, "WEBP", lossless=True, quality=0, method=0)
    measured = measured_bytes(tmp_path / "upload", upload, "change")
    assert 12 * side * side < measured < BYTES_PER_DECODED_PIXEL * side * side


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_decoding_a_jpeg_takes_no_more_memory_than_is_promised(tmp_path: Path, mode: str) -> None:
    side = 2500
    pixels = np.full((side, side, len(mode)), 128, np.uint8)
    pixels[::7, ::3] = 200
    file = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels, mode).save(file, "JPEG", progressive=True, subsampling=0, exif=turned)
    measured = measured_bytes(tmp_path / "upload", file.getvalue(), "decode")
    assert 8 * side * side < measured < BYTES_PER_JPEG_PIXEL * side * side


def test_a_picture_that_pillow_calls_a_bomb_is_undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_: object) -> None:
        raise Image.DecompressionBombError

    monkeypatch.setitem(DECODERS, "png", explode)
    with pytest.raises(Undecodable):
        decode_image(png(NOISE), (8, 8), LIMIT)
