from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

import training.augmentation
from models.randomness import generator_for
from tests.training.tiny import color_set
from training.augmentation import Augmentation, Blur, Jitter, Solarize, augment
from training.config import ClassifierRecipe
from training.data import Batches
from training.reading import read_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes" / "cifar10"
PLAIN = Augmentation(padding=0, flip=False)
SETTINGS = {
    name: read_recipe(RECIPES / f"{name}.toml", ClassifierRecipe).augmentation
    for name in ("vanilla", "standard", "strong")
}


def only(**settings: object) -> Augmentation:
    """An augmentation of one operation."""
    return Augmentation.model_validate({"padding": 0, "flip": False, **settings})


def noise(count: int, side: int = 8) -> Tensor:
    """Images as they come from files: whole 255ths."""
    return torch.randint(0, 256, (count, 3, side, side)) / 255


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which images are others, (N,)."""
    return (before != after).flatten(1).any(1)


def assert_share(chosen: Tensor, probability: float) -> None:
    """As many were chosen as chance makes of it, to four standard deviations."""
    spread = math.sqrt(len(chosen) * probability * (1 - probability))
    assert abs(int(chosen.sum()) - len(chosen) * probability) <= 4 * spread


# Shifts and mirror images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_padding_and_no_flip_is_the_identity() -> None:
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(augment(images, PLAIN, generator()), images)


def test_flips_are_mirror_images_of_half_of_them() -> None:
    images = torch.rand(400, 1, 2, 2)
    flipped = augment(images, Augmentation(padding=0, flip=True), generator())
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    unchanged = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert 150 < mirrored.sum() < 250


def test_crops_are_windows_of_the_reflected_image_and_all_of_them_occur() -> None:
    side, padding = 5, 2
    image = torch.arange(side * side, dtype=torch.float32).view(side, side)
    reflected = torch.from_numpy(np.pad(image.numpy(), padding, mode="reflect"))
    windows = reflected.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side, side)
    assert len(windows) == 25

    crops = augment(image.expand(600, 3, side, side), Augmentation(padding=padding, flip=False), generator())

    assert (crops == crops[:, :1]).all()  # every channel is cut alike
    found = (crops[:, :1] == windows).flatten(2).all(2)
    assert (found.sum(1) == 1).all()
    assert found.any(0).all()


def test_augmentation_is_drawn_by_its_generator_alone() -> None:
    images, both = torch.rand(8, 3, 8, 8), Augmentation(padding=2)
    assert torch.equal(augment(images, both, generator(1)), augment(images, both, generator(1)))
    assert not torch.equal(augment(images, both, generator(1)), augment(images, both, generator(2)))


# The recipes


def test_vanilla_changes_nothing() -> None:
    images = noise(20)
    assert torch.equal(augment(images, SETTINGS["vanilla"], generator()), images)


def test_standard_changes_nearly_every_image() -> None:
    images = noise(50, side=16)
    assert changed(images, augment(images, SETTINGS["standard"], generator())).all()


@pytest.mark.parametrize("name", ["standard", "strong"])
def test_shape_and_range_stay(name: str, device: torch.device) -> None:
    extremes = (torch.rand(200, 3, 16, 12) < 0.5).float()
    for images in (extremes, torch.rand(200, 3, 16, 12)):
        augmented = augment(images.to(device), SETTINGS[name], generator())
        assert augmented.shape == images.shape
        assert augmented.is_contiguous(memory_format=torch.channels_last)
        assert augmented.min() >= 0
        assert augmented.max() <= 1


@pytest.mark.parametrize("name", ["standard", "strong"])
def test_a_step_always_gives_the_same_images_whatever_was_drawn_elsewhere(name: str) -> None:
    def batch(step: int) -> Tensor:
        return Batches(color_set(24), 8, SETTINGS[name], seed=0, device=torch.device("cpu")).at(step)[0]

    first = batch(5)
    before = torch.get_rng_state()
    torch.rand(100)
    assert torch.equal(batch(5), first)
    torch.set_rng_state(before)
    batch(6)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator was not asked
    assert not torch.equal(batch(8), first)


def test_equal_images_become_different_ones() -> None:
    alike = noise(1, side=16).expand(64, -1, -1, -1)
    assert len(augment(alike, SETTINGS["strong"], generator()).unique(dim=0)) == 64


def test_what_becomes_of_an_image_does_not_hang_on_the_others() -> None:
    images = noise(32, side=16)
    others = torch.cat([images[:1], 1 - images[1:]])
    one, other = (augment(batch, SETTINGS["strong"], generator()) for batch in (images, others))
    assert torch.allclose(one[0], other[0], atol=1e-6)
    assert changed(one[1:], other[1:]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}},
        {"blur": {"sigma": (0.5, 2.0)}},
    ],
    ids=["jitter", "blur"],
)
def test_how_much_an_image_changes_does_not_hang_on_which_others_do(settings: dict[str, dict[str, object]]) -> None:
    images = noise(100, side=16)
    ((name, strengths),) = settings.items()
    every = augment(images, only(**settings), generator())
    some = augment(images, only(**{name: {**strengths, "probability": 0.5}}), generator())
    alike = changed(images, some)
    assert_share(alike, 0.5)
    assert torch.allclose(some[alike], every[alike], atol=1e-6)


def test_the_callers_images_are_left_alone() -> None:
    images = noise(32, side=16)
    before = images.clone()
    augment(images, SETTINGS["strong"], generator())
    assert torch.equal(images, before)


# Resized crops


def ramps(count: int, height: int, width: int) -> Tensor:
    """Images whose red says how far right a pixel is, whose green how far down, from 0 to 1."""
    across, down = (
        torch.linspace(0, 1, width).expand(height, -1),
        torch.linspace(0, 1, height)[:, None].expand(-1, width),
    )
    return torch.stack([across, down, torch.zeros(height, width)]).expand(count, -1, -1, -1)


def test_resized_crops_are_windows_of_the_asked_area_and_a_bounded_aspect() -> None:
    height, width = 24, 32
    crops = augment(ramps(2000, height, width), only(crop_scale=(0.25, 1.0)), generator())

    across, down = crops[:, 0], crops[:, 1]
    assert torch.allclose(across, across[:, :1].expand_as(across), atol=1e-5)  # upright
    assert torch.allclose(down, down[:, :, :1].expand_as(down), atol=1e-5)
    steps = across.diff(dim=2)
    assert torch.allclose(steps, steps.mean(2, keepdim=True).expand_as(steps), atol=1e-5)  # evenly spaced
    columns = (across[:, 0, -1] - across[:, 0, 0]) * (width - 1) + 1
    rows = (down[:, -1, 0] - down[:, 0, 0]) * (height - 1) + 1
    area, aspect = rows * columns / (height * width), columns * height / (rows * width)
    assert 0.249 < area.min() < 0.27
    assert 0.97 < area.max() < 1.001
    assert area.mean() == pytest.approx(0.625, abs=0.02)
    assert aspect.min() == pytest.approx(3 / 4, abs=0.01)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.01)


def test_small_crops_reach_every_side() -> None:
    across, down, _ = augment(ramps(1000, 24, 32), only(crop_scale=(0.25, 0.25)), generator()).unbind(1)
    assert across[:, 0, 0].min() < 0.01
    assert across[:, 0, -1].max() > 0.99
    assert down[:, 0, 0].min() < 0.01
    assert down[:, -1, 0].max() > 0.99


def test_crops_of_nearly_the_whole_area_are_as_wide_or_as_high_as_fits() -> None:
    across, down, _ = augment(ramps(1000, 32, 32), only(crop_scale=(0.8, 0.8)), generator()).unbind(1)
    columns, rows = (31 * (ramp[:, -1, -1] - ramp[:, 0, 0]) + 1 for ramp in (across, down))
    assert torch.allclose(columns * rows, torch.full((1000,), 0.8 * 32 * 32), rtol=1e-3)
    assert 31.8 < columns.max() < 32.001
    assert 31.8 < rows.max() < 32.001


def test_a_crop_of_the_whole_area_is_the_image() -> None:
    images = noise(10)
    assert torch.allclose(augment(images, only(crop_scale=(1.0, 1.0)), generator()), images, atol=1e-5)


def test_the_tiniest_crop_is_still_upright() -> None:
    crops = augment(ramps(50, 4, 4), only(crop_scale=(0.001, 0.001)), generator())
    assert (crops[:, 0].diff(dim=2) > 0).all()
    assert (crops[:, 1].diff(dim=1) > 0).all()


# Colors


@pytest.mark.parametrize(
    ("settings", "probability"),
    [
        ({"jitter": Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8)}, 0.8),
        ({"grey": 0.2}, 0.2),
        ({"blur": Blur(sigma=(0.5, 2.0), probability=0.5)}, 0.5),
        ({"solarize": Solarize(threshold=0.5, probability=0.2)}, 0.2),
        ({"equalize": 0.2}, 0.2),
        ({"flip": True}, 0.5),
    ],
    ids=["jitter", "grey", "blur", "solarize", "equalize", "flip"],
)
def test_an_operation_changes_its_share_of_the_images(settings: dict[str, object], probability: float) -> None:
    images = noise(1000, side=20)
    assert_share(changed(images, augment(images, only(**settings), generator())), probability)


def test_strong_has_every_operation_at_its_share() -> None:
    strong = SETTINGS["strong"]
    assert strong.model_dump() == {
        "padding": 0,
        "crop_scale": (0.25, 1.0),
        "flip": True,
        "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "probability": 0.8},
        "grey": 0.2,
        "blur": {"sigma": (0.1, 2.0), "probability": 0.5},
        "solarize": {"threshold": 0.5, "probability": 0.2},
        "equalize": 0.2,
    }
    images = noise(500, side=16)
    greys = augment(images, strong.model_copy(update={"equalize": 0.0, "jitter": None}), generator())
    assert_share((greys.amax(1) - greys.amin(1)).flatten(1).amax(1) < 1e-5, 0.2)


def test_brightness_is_a_factor_of_each_image_of_its_own() -> None:
    images = torch.rand(500, 3, 4, 4) / 2 + 0.1
    jitter = Jitter(brightness=0.4, contrast=0, saturation=0, hue=0)
    factors = (augment(images, only(jitter=jitter), generator()) / images).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), atol=1e-3)
    assert 0.599 < factors.min() < 0.62
    assert 1.38 < factors.max() < 1.401
    assert len(factors[:, 0].unique()) > 490


def luma(images: Tensor) -> Tensor:
    """Perceived brightness, (N, H, W)."""
    return (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)


def test_contrast_stretches_about_the_mean_brightness() -> None:
    images = torch.rand(200, 3, 4, 4) / 4 + 0.4
    jitter = Jitter(brightness=0, contrast=0.4, saturation=0, hue=0)
    stretched = augment(images, only(jitter=jitter), generator())
    assert torch.allclose(luma(stretched).mean((1, 2)), luma(images).mean((1, 2)), atol=1e-4)
    factors = stretched.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.59 < factors.min() < 0.65
    assert 1.35 < factors.max() < 1.41


def test_saturation_keeps_the_brightness_of_every_pixel() -> None:
    images = torch.rand(200, 3, 4, 4) / 4 + 0.4
    jitter = Jitter(brightness=0, contrast=0, saturation=0.2, hue=0)
    colored = augment(images, only(jitter=jitter), generator())
    assert torch.allclose(luma(colored), luma(images), atol=1e-4)
    factors = (colored.amax(1) - colored.amin(1)) / (images.amax(1) - images.amin(1))
    assert 0.79 < factors.min() < 0.82
    assert 1.18 < factors.max() < 1.21


def test_hue_turns_colors_and_leaves_grey() -> None:
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(300, 3, 2, 2)
    jitter = Jitter(brightness=0, contrast=0, saturation=0, hue=0.1)
    turned = augment(red, only(jitter=jitter), generator())
    assert torch.allclose(turned[:, 0], torch.ones(300, 2, 2), atol=1e-5)  # within a sixth of the circle, red is full
    assert 0.55 < turned[:, 1].max() < 0.601  # a tenth of the circle: six tenths of the way to yellow
    assert 0.55 < turned[:, 2].max() < 0.601
    grey = torch.rand(20, 1, 2, 2).expand(-1, 3, -1, -1)
    assert torch.allclose(augment(grey, only(jitter=jitter), generator()), grey, atol=1e-5)


def test_the_four_changes_of_color_come_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        "adjust_brightness_accumulative",
        "adjust_contrast_with_mean_subtraction",
        "adjust_saturation_with_gray_subtraction",
        "adjust_hue",
    )
    for number, name in enumerate(names, 1):
        monkeypatch.setattr(training.augmentation, name, lambda some, _, number=number: 10 * some + number)
    jitter = Jitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)
    written = augment(torch.zeros(1000, 3, 1, 1), only(jitter=jitter), generator())[:, 0, 0, 0].int()
    assert len(written.unique()) == 24
    assert {"".join(sorted(str(order))) for order in written.tolist()} == {"1234"}


def test_grey_images_keep_their_brightness() -> None:
    images = noise(200)
    grey = augment(images, only(grey=1.0), generator())
    assert torch.allclose(grey[:, 0], luma(images), atol=1e-5)
    assert torch.equal(grey, grey[:, :1].expand_as(grey))


def test_solarized_images_are_negatives_where_they_were_bright() -> None:
    images = noise(50)
    solarized = augment(images, only(solarize=Solarize(threshold=0.75)), generator())
    assert torch.allclose(solarized, torch.where(images >= 0.75, 1 - images, images))


def test_equalized_images_are_pillows() -> None:
    images = noise(10, side=16) * 0.5
    pixels = (images * 255).byte()
    equalized = augment(pixels / 255, only(equalize=1.0), generator())
    for image, expected in zip(equalized, pixels, strict=True):
        picture = ImageOps.equalize(Image.fromarray(expected.permute(1, 2, 0).numpy()))
        assert torch.allclose(image.permute(1, 2, 0) * 255, torch.from_numpy(np.array(picture)).float(), atol=1e-3)


def test_a_blur_is_gaussian_out_to_three_deviations() -> None:
    images = noise(3, side=32)
    blurred = augment(images, only(blur=Blur(sigma=(1.5, 1.5))), generator())
    expected = images.numpy()
    for axis in (2, 3):
        expected = gaussian_filter1d(expected, 1.5, axis=axis, mode="mirror", radius=5)
    assert torch.allclose(blurred, torch.from_numpy(expected), atol=1e-5)


def test_every_image_has_a_blur_of_its_own() -> None:
    alike = noise(1, side=16).expand(200, -1, -1, -1)
    spread = augment(alike, only(blur=Blur(sigma=(0.1, 2.0))), generator()).std((1, 2, 3))
    assert len(spread.unique()) > 150  # those of the smallest deviations blur nothing
    assert spread.max() == pytest.approx(float(alike[0].std()), rel=1e-3)
    assert spread.min() < 0.3 * spread.max()


def test_a_blur_wider_than_the_image_is_cut_off_where_reflection_ends() -> None:
    images = noise(4, side=3)
    blurred = augment(images, only(blur=Blur(sigma=(5.0, 5.0))), generator())
    assert changed(images, blurred).all()


def test_augmentation_belongs_to_its_step() -> None:
    images = noise(16, side=16)
    steps = [augment(images, SETTINGS["strong"], generator_for(0, "augment", step)) for step in (1, 1, 2)]
    assert torch.equal(steps[0], steps[1])
    assert changed(steps[0], steps[2]).all()
