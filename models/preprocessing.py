"""Pictures of any size and mode as RGB at a model's input size: Pillow and numpy only.

This is part of what a model sees: the service does it to uploads and training to data sets, so that a classifier
is trained on what it will be sent. A change of it is a change of every model.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB: 16-bit grey keeps its high byte, alpha is laid over white, the rest is Pillow's own.

    Color profiles are ignored: samples are taken as sRGB. A picture that is RGB is handed back as it is.
    """
    if image.mode.startswith("I"):  # 16-bit grey
        samples = np.asarray(image)
        grey = (samples >> 8).astype(np.uint8)
        grey[samples == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centered crop of the aspect of `size` (height, width), resized to it.

    One resize with Pillow's bilinear filter, which widens with the scale: anti-aliased, every pixel of the crop has
    a say, nothing overshoots. A crop that has the size already comes through bit-exact.
    """
    height, width = size
    box = crop_box(image.size, size)
    left, top, right, bottom = box
    if (right - left, bottom - top) == (width, height):
        return image if image.size == (width, height) else image.crop(box)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def crop_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest centered box of the aspect of `size` (height, width), in whole pixels.

    `image_size` is Pillow's: width, height.
    """
    image_width, image_height = image_size
    height, width = size
    crop_width = min(image_width, max(1, round(image_height * width / height)))
    crop_height = min(image_height, max(1, round(image_width * height / width)))
    left, top = (image_width - crop_width) // 2, (image_height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
