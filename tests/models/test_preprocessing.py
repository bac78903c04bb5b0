from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.preprocessing import center_crop_resize, crop_box, to_rgb

NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_a_picture_of_the_size_already_comes_through_bit_exact() -> None:
    assert (np.asarray(center_crop_resize(Image.fromarray(NOISE), (12, 16))) == NOISE).all()


def test_what_the_crop_cuts_off_is_outside_the_center() -> None:
    framed = np.zeros((12, 20, 3), np.uint8)
    framed[:, 2:18] = NOISE
    assert (np.asarray(center_crop_resize(Image.fromarray(framed), (12, 16))) == NOISE).all()

    framed = np.zeros((18, 16, 3), np.uint8)
    framed[3:15] = NOISE
    assert (np.asarray(center_crop_resize(Image.fromarray(framed), (12, 16))) == NOISE).all()


def test_shrinking_averages_all_pixels_of_the_crop() -> None:
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(checkers.astype(np.uint8)).convert("RGB")

    small = np.asarray(center_crop_resize(image, (8, 8))).astype(int)

    assert abs(small - 127.5).max() < 8  # a filter of one or two pixels a side would return black or white ones


def test_enlarging_neither_overshoots_nor_moves_the_picture() -> None:
    edge = np.zeros((4, 4, 3), np.uint8)
    edge[:, 2:] = 200

    large = np.asarray(center_crop_resize(Image.fromarray(edge), (16, 16))).astype(int)

    assert large.min() == 0
    assert large.max() == 200
    assert (large + large[:, ::-1] == 200).all()  # the edge stays in the middle


SIDES = st.integers(1, 500)


@given(image_size=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES))
def test_the_crop_is_centered_and_the_largest_of_its_aspect(image_size: tuple[int, int], size: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(image_size, size)
    (width, height), aspect = image_size, size[1] / size[0]

    assert width - right - left in (0, 1)
    assert height - bottom - top in (0, 1)
    as_high_as_it_can = (right - left, bottom - top) == (max(1, round(height * aspect)), height)
    as_wide_as_it_can = (right - left, bottom - top) == (width, max(1, round(width / aspect)))
    as_large_as_it_can = (right, bottom) == (width, height)  # its aspect is the model's but for rounding
    assert as_high_as_it_can or as_wide_as_it_can or as_large_as_it_can


def palette_image() -> Image.Image:
    """One pixel of the second of two colors."""
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        (palette_image(), (10, 20, 30)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_becomes_rgb(image: Image.Image, color: tuple[int, int, int]) -> None:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == color


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    grey = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
    assert (np.asarray(to_rgb(Image.fromarray(grey)))[..., 1] == grey >> 8).all()


def test_alpha_is_laid_over_white() -> None:
    half_black = Image.new("RGBA", (2, 2), (0, 0, 0, 102))
    assert to_rgb(half_black).getpixel((0, 0)) == (153, 153, 153)
    assert to_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
