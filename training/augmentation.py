"""Random changes of training images, each drawn for one image from a generator that belongs to the step.

kornia computes them, from numbers that are drawn here: its own random classes take torch's global generator, which
a run that was killed could not restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    equalize,
    solarize,
)
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import crop_and_resize
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor

from models.manifest import Fraction, Strict

PositiveFraction = Annotated[float, Field(gt=0, le=1)]


class Jitter(Strict):
    """Factors in 1 ± `brightness`, `contrast` and `saturation`, and a turn in ± `hue` of the color circle."""

    brightness: Fraction
    contrast: Fraction
    saturation: Fraction
    hue: Annotated[float, Field(ge=0, le=0.5)]
    probability: PositiveFraction = 1.0


class Blur(Strict):
    """Gaussian blur of a standard deviation in `sigma`, in pixels."""

    sigma: tuple[PositiveFloat, PositiveFloat]
    probability: PositiveFraction = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma[0] > self.sigma[1]:
            raise ValueError("sigma is a smallest and a largest deviation, in this order")
        return self


class Solarize(Strict):
    """Values at or above `threshold` inverted."""

    threshold: Fraction = 0.5
    probability: PositiveFraction = 1.0


class Augmentation(Strict):
    """Random changes of training images, made in this order, each drawn for each image."""

    padding: NonNegativeInt = 4
    """Pixels reflected on each side before a window of the image's size is cut out."""
    crop_scale: tuple[PositiveFraction, PositiveFraction] | None = None
    """Instead of `padding`: the smallest and the largest share of the area that a crop, then enlarged, has."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    jitter: Jitter | None = None
    grey: Fraction = 0.0
    """Share of the images that lose their colors."""
    blur: Blur | None = None
    solarize: Solarize | None = None
    equalize: Fraction = 0.0
    """Share of the images whose channels' histograms are flattened; images of less than 256 pixels stay as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.crop_scale and self.padding:
            raise ValueError("crop_scale and padding are two ways to crop: set padding to 0")
        if self.crop_scale and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale is a smallest and a largest share, in this order")
        return self


LARGEST_ASPECT = 4 / 3
"""Of a resized crop, width by height or height by width."""


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Training images (N, 3, H, W) in [0, 1], changed as `settings` say; shape and range stay.

    The order is that of the settings: crop, mirror, colors, grey, blur, solarize, equalize. Every draw is per image,
    and made whether it is used or not, so that what one image gets does not hang on the others' luck.
    """
    if settings.padding:
        images = shifted(images, settings.padding, generator)
    if settings.crop_scale:
        images = resized_crops(images, settings.crop_scale, generator)
    if settings.flip:
        images = for_some(images, 0.5, generator, lambda some, _: some.flip(3))
    if settings.jitter:
        images = jittered(images, settings.jitter, generator)
    if settings.grey:
        images = for_some(images, settings.grey, generator, lambda some, _: rgb_to_grayscale(some).expand_as(some))
    if settings.blur:
        images = blurred(images, settings.blur, generator)
    if settings.solarize:
        threshold = settings.solarize.threshold
        probability = settings.solarize.probability
        images = for_some(images, probability, generator, lambda some, _: solarize(some, threshold))
    if settings.equalize:
        images = for_some(images, settings.equalize, generator, lambda some, _: equalize(some))
    return images.contiguous(memory_format=torch.channels_last)


def for_some(
    images: Tensor, probability: float, generator: torch.Generator, change: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The images, of which `change(some, indices)` replaces those at `indices`: each with that probability."""
    chosen = torch.rand(len(images), generator=generator) < probability
    indices = chosen.nonzero().squeeze(1)
    if len(indices) == 0:
        return images
    there = indices.to(images.device)
    return images.index_copy(0, there, change(images[there], indices))


def shifted(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Windows of the images' own size after reflecting `padding` pixels on each side."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + offsets[0]).to(images.device)
    columns = (torch.arange(width) + offsets[1]).to(images.device)
    padded = F.pad(images, (padding, padding, padding, padding), mode="reflect").permute(0, 2, 3, 1)
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crops(images: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Windows of a share of the area in `scale`, of an aspect up to 4 : 3 that fits, enlarged to the images' size."""
    count, _, height, width = images.shape
    area, skew, *place = torch.rand(4, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp((2 * skew - 1) * torch.minimum(torch.tensor(math.log(LARGEST_ASPECT)), -area.log()))
    # In pixels; a window of less than two has no inside to enlarge.
    window = torch.stack([width * (area * aspect).sqrt(), height * (area / aspect).sqrt()], 1).clamp(min=2)
    size = torch.tensor([width, height])
    first = torch.stack(place, 1) * (size - window)
    left, top, right, bottom = *first.T, *(first + window - 1).T
    corners = torch.stack([left, top, right, top, right, bottom, left, bottom], 1).view(count, 4, 2)
    return crop_and_resize(images, corners.to(images), (height, width)).clamp(0, 1)


def jittered(images: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed, in an order of each image's own."""
    count = len(images)
    draws = 2 * torch.rand(count, 4, generator=generator) - 1
    order = torch.rand(count, 4, generator=generator).argsort(1)
    strengths = torch.tensor([jitter.brightness, jitter.contrast, jitter.saturation, 2 * math.pi * jitter.hue])
    amounts = draws * strengths + torch.tensor([1.0, 1.0, 1.0, 0.0])  # three factors and an angle
    changes = (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
        adjust_hue,
    )

    def change(some: Tensor, indices: Tensor) -> Tensor:
        for turn in order[indices].T:
            for number, adjust in enumerate(changes):
                mine = (turn == number).nonzero().squeeze(1)
                if len(mine):
                    there, amount = mine.to(some.device), amounts[indices[mine], number].to(some)
                    some = some.index_copy(0, there, adjust(some[there], amount))
        return some

    return for_some(images, jitter.probability, generator, change)


def blurred(images: Tensor, blur: Blur, generator: torch.Generator) -> Tensor:
    """Gaussian blur of a deviation in `blur.sigma`, cut off at three times the largest or where reflection ends."""
    smallest, largest = blur.sigma
    radius = min(math.ceil(3 * largest), *(side - 1 for side in images.shape[2:]))
    sigmas = smallest + (largest - smallest) * torch.rand(len(images), 1, generator=generator)

    def change(some: Tensor, indices: Tensor) -> Tensor:
        return gaussian_blur2d(some, 2 * radius + 1, sigmas[indices].expand(-1, 2).to(some)).clamp(0, 1)

    return for_some(images, blur.probability, generator, change)
