"""Bytes to pixels and back. No torch, so that a gateway can do it.

The recipe, the same for every upload (steps 1, 3 and 4 are `models.preprocessing`, which training uses too, so that a
model is served what it was trained on; `tests/service/test_images.py` pins all of it):

1. colors: 16-bit samples keep their high byte; grey, palette and CMYK become RGB (CMYK and YCCK inverted, as
   Adobe writes them); alpha is laid over white; color profiles are ignored: samples are taken as sRGB;
2. EXIF orientation 1 to 8 is applied, an invalid one ignored;
3. the largest centered crop of the model's aspect, in whole pixels;
4. one resize with Pillow's BILINEAR, which widens its triangle with the scale: anti-aliased, every pixel of
   the crop has a say (image-scaling attacks hide theirs in the pixels that a sparse filter would pick),
   nothing overshoots, and the same filter serves enlarging. An image that has the model's size already comes through
   bit-exact.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from models.preprocessing import center_crop_resize, crop_box, to_rgb
from service.errors import Undecodable
from service.headers import Header, read_header
from service.memory import UNLIMITED, Memory
from service.work import Floats, Pixels

DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
    "bmp": BmpImageFile,
}
"""Called directly: `Image.open` would try others, and apply the process-wide pixel limit instead of ours."""
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's plugins raise for damaged files."""
PLAIN_JPEG_COLORS = ("YCbCr", "Gray", "RGB")
"""For which libjpeg-turbo's own interface makes the same pixels as Pillow does by it, without Pillow's parsing."""
BYTES_PER_DECODED_PIXEL = 40
"""At most, at the worst moment of decoding an upload or changing and encoding it at its own size: see the tests."""
BYTES_PER_JPEG_PIXEL = 16
"""The same of a JPEG that is decoded, at its own size or not."""
BYTES_PER_PURIFIED_SAMPLE = 5
"""Of an image at the model's size, kept beside what it became: uint8 and float32."""
MAX_WEBP_SIDE = 16383
"""The format has no larger pictures."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""

QUICK_BYTES = 8 * 1024
QUICK_PIXELS = 64 * 64
"""Within both, decoding costs less than the way to a thread and back under load."""
COMPRESSED_METADATA = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG of which a few bytes can inflate to megabytes: never quick."""
STRIP_ROWS = 256
"""Rows of an original that are changed at a time: keeps float copies of a large photograph small."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upload at the model's input size, and what it was."""

    pixels: Pixels
    format: str
    width: int
    height: int


def decode_image(data: bytes, input_size: tuple[int, int], max_pixels: int, memory: Memory = UNLIMITED) -> Decoded:
    """The upload `data` by the recipe above, at `input_size` (height, width).

    Raises what `read_header` raises, Undecodable, and ShortOfMemory.
    """
    header = read_header(data, max_pixels)
    pixel_bytes = BYTES_PER_JPEG_PIXEL if header.format == "jpeg" else BYTES_PER_DECODED_PIXEL
    with memory.promise(pixel_bytes * header.width * header.height):
        return _decoded(header, input_size)


def decode_if_quick(data: bytes, input_size: tuple[int, int], max_pixels: int) -> Decoded | None:
    """As `decode_image` if upload and model input have a few thousand pixels; None for what belongs in a thread."""
    height, width = input_size
    if len(data) > QUICK_BYTES or height * width > QUICK_PIXELS or any(kind in data for kind in COMPRESSED_METADATA):
        return None
    header = read_header(data, max_pixels)
    return None if header.width * header.height > QUICK_PIXELS else _decoded(header, input_size)


def _decoded(header: Header, input_size: tuple[int, int]) -> Decoded:
    image = center_crop_resize(_upright_rgb(header), input_size)
    return Decoded(np.asarray(image), header.format, header.width, header.height)


def change_original(header: Header, change: Floats) -> Pixels:
    """The upload of `header` at its own size, upright, with `change` (h, w, 3), at model size, added to its crop.

    Detail finer than the model's resolution is carried over as it came: unpurified. Raises Undecodable.
    """
    image = _upright_rgb(header)
    height, width = change.shape[:2]
    left, top, right, bottom = crop_box(image.size, (height, width))
    pixels = np.array(image)
    crop = pixels[top:bottom, left:right]
    planes = [Image.fromarray(np.ascontiguousarray(change[..., channel])) for channel in range(3)]
    for start in range(0, bottom - top, STRIP_ROWS):
        strip = crop[start : start + STRIP_ROWS]
        strip[...] = to_bytes(to_floats(strip) + _enlarged_rows(planes, crop.shape, start, len(strip)))
    return pixels


def _enlarged_rows(planes: list[Image.Image], shape: tuple[int, ...], start: int, rows: int) -> Floats:
    """`rows` rows from `start` of the planes as they would be at `shape` (H, W, ...)."""
    scale = planes[0].height / shape[0]
    box = (0, start * scale, planes[0].width, min((start + rows) * scale, planes[0].height))
    size = (shape[1], rows)
    enlarged = [np.asarray(plane.resize(size, Image.Resampling.BILINEAR, box=box)) for plane in planes]
    return np.stack(enlarged, axis=-1)


def to_floats(pixels: Pixels) -> Floats:
    """0 to 255 to [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


def to_bytes(image: Floats) -> Pixels:
    """[0, 1] to the nearest of 0 to 255; what is outside is clipped."""
    return (image.clip(0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def encode_purified(
    image: Floats,
    model_input: Pixels,
    original: bytes | None,
    media_type: str,
    max_pixels: int,
    memory: Memory = UNLIMITED,
) -> bytes:
    """The purified `image` at the model's size, or what purification changed put onto the `original` upload.

    Raises as `decode_image`.
    """
    if original is None:
        return encode_image(image, media_type)
    header = read_header(original, max_pixels)
    with memory.promise(BYTES_PER_DECODED_PIXEL * header.width * header.height):
        return encode_pixels(change_original(header, image - to_floats(model_input)), media_type)


def encode_image(image: Floats, media_type: str) -> bytes:
    """`image` as image/png, image/webp (lossless) or application/x-npy (float32, not rounded to 8 bits)."""
    file = io.BytesIO()
    if media_type == "application/x-npy":
        np.save(file, image, allow_pickle=False)
        return file.getvalue()
    return encode_pixels(to_bytes(image), media_type)


def encode_pixels(pixels: Pixels, media_type: str) -> bytes:
    """`pixels` as image/png or image/webp (lossless)."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    if media_type == "image/webp":
        picture.save(file, "WEBP", lossless=True, quality=50, method=0)  # higher methods take seconds for a photograph
    else:
        picture.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _upright_rgb(header: Header) -> Image.Image:
    """Decode, steps 1 and 2 of the recipe."""
    rgb = (_plain_jpeg(header) if header.format == "jpeg" else None) or _decode_by_pillow(header)
    turn = TURNS.get(header.orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _plain_jpeg(header: Header) -> Image.Image | None:
    """None for other colors, and for whatever is unusual or damaged: Pillow's word on it holds."""
    size = header.width, header.height
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(header.data, strict=True)
        if (width, height) != size or colors not in PLAIN_JPEG_COLORS:
            return None
        # four bytes a pixel, as Pillow keeps them
        pixels = simplejpeg.decode_jpeg(header.data, "RGBX", fastdct=False, fastupsample=False, strict=True)
    except (ValueError, KeyError, RuntimeError):  # KeyError: a subsampling that it has no name for
        return None
    return Image.frombytes("RGB", size, pixels, "raw", "RGBX")


def _decode_by_pillow(header: Header) -> Image.Image:
    try:
        image = DECODERS[header.format](io.BytesIO(header.data))
        if image.size != (header.width, header.height):
            raise Undecodable("the image contradicts itself about its size")
        image.load()
        return to_rgb(image)
    except DAMAGED as error:
        raise Undecodable("the image is damaged or truncated") from error
