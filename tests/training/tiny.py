"""Data, recipes and runs so small that a whole pipeline takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.__main__ import main
from training.config import DataRecipe, Recipe
from training.data import ImageSet
from training.runs import Run, Task, fit

SIDE = 8
CLASSES = ("red", "green", "blue")


def colors(count: int, seed: int = 0, side: int = SIDE) -> tuple[NDArray[np.uint8], list[int]]:
    """Noisy images (N, side, side, 3) in which one channel is brighter, and which one that is."""
    generator = np.random.default_rng(seed)
    labels = [index % 3 for index in range(count)]
    pixels = generator.integers(0, 120, (count, side, side, 3))
    pixels[np.arange(count), :, :, labels] += 100
    return pixels.astype(np.uint8), labels


def color_set(count: int, seed: int = 0) -> ImageSet:
    """The same as an ImageSet."""
    pixels, labels = colors(count, seed)
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), CLASSES)


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """Images (N, H, W, 3) as the loader gives them, (N, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def picture(color: int = 0, side: int = SIDE) -> Image.Image:
    """A grey square."""
    return Image.new("RGB", (side, side), (color,) * 3)


def recipe_for(
    source: Path | str, size: int = SIDE, classes: tuple[str, ...] | None = None, label_column: str | None = None
) -> DataRecipe:
    """What a recipe says of its data."""
    return DataRecipe(name="tiny", source=str(source), input_size=size, classes=classes, label_column=label_column)


def write_table(
    folder: Path, columns: Mapping[str, Sequence[object]], features: dict[str, object] | None = None
) -> Path:
    """A parquet file `train` of any columns; `img` holds images."""
    kinds = datasets.Features({"img": datasets.Image(), **features}) if features else None
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def write_parquet(folder: Path, split: str, pixels: NDArray[np.uint8], labels: list[int]) -> None:
    """A split as the hub stores it: PNG bytes in a column `img`, numbered classes with names in `label`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"img": [Image.fromarray(image) for image in pixels], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


DATA = {"name": "colors", "source": "nowhere", "input_size": SIDE}
INPAINTER = {"architecture": "unet", "width": 4}
MAE = {
    "architecture": "mae",
    **{"patch_size": 2, "width": 16, "depth": 1, "heads": 2},
    **{"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
}
TRANSFORM = {"transform": "rt2", "working_size": SIDE, "sigma": 0.05, "cells_per_side": 4}
PURIFIER = {
    "seed": 3,
    "data": DATA,
    "batch_size": 8,
    "epochs": 1,
    "lr": 2e-3,
    "average_decay": 0.5,
    "gan_weight": 0.01,
    "discriminator_width": 2,
    "precision": "float32",
    "augmentation": {"padding": 1},
    "inpainter": INPAINTER,
    "transform": TRANSFORM,
}
EFFORT = {
    "bpda_steps": 2,
    "bpda_draws": 2,
    "full_steps": 2,
    "full_draws": 2,
    "apgd_steps": 3,
    "apgd_draws": 1,
    "square_queries": 3,
    "aware_steps": 2,
}
RECIPES: dict[str, dict[str, Any]] = {
    "train-classifier": {
        "name": "classifier",
        "seed": 1,
        "data": DATA,
        "architecture": "wrn-16-2",
        "mirrored": True,
        "batch_size": 8,
        "epochs": 3,
        "lr": 0.05,
        "warmup_epochs": 1,
        "cutmix": 0.5,
        "average_decay": 0.8,
        "precision": "float32",
        "augmentation": {"padding": 1},
    },
    "pretrain-purifier": {"name": "purifier", **PURIFIER},
    "finetune-atop": {
        "name": "atop",
        **PURIFIER,
        "classifier_run": "classifier",
        "purifier_run": "purifier",
        "attacked_fraction": 0.5,
    },
    "train-aid": {
        "name": "aid",
        "data": DATA,
        "classifier_run": "classifier",
        "batch_size": 8,
        "epochs": 1,
        "attack_steps": 2,
        "attack_step_size": 0.02,
        "precision": "float32",
        "augmentation": {"padding": 1},
        "discriminator": {"taps": ["stage1", "stage3"], "width": 16},
    },
    "export": {
        "name": "colors",
        "version": "1",
        "classifier_run": "classifier",
        "atop_run": "atop",
        "atop_presets": {"rt2": TRANSFORM, "rt3": {**TRANSFORM, "transform": "rt3"}},
        "aid_run": "aid",
        "aid_presets": {"code": {"steps": 2}},
        "zeropur_presets": {
            "code": {
                "blur": {"kind": "gaussian", "size": 0.6},
                "coarse_steps": 2,
                "fine_steps": 2,
                "fine_layers": ["stage2"],
            }
        },
        "auto_presets": {"zeropur": {"strong": "zeropur", "false_positive_rate": 0.05}},
        "default_defense": "atop",
    },
    "evaluate": {
        "data": DATA,
        "defenses": ["atop", "atop:rt3", "aid", "zeropur"],
        "batch_size": 4,
        "budget": {
            "clean_images": 20,
            "clean_draws": 2,
            "grey_box_images": 10,
            "costly_images": 6,
            "grey_box": ["fgsm", "pgd3"],
            "one_pass": {**EFFORT, "images": 6},
            "descending": {**EFFORT, "images": 4, "iterate_steps": 1, "smooth_steps": 1},
        },
    },
}


def toml(value: object) -> str:
    """A value as TOML, tables inline."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def write_recipe(path: Path, fields: Mapping[str, object]) -> Path:
    """A recipe file."""
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in fields.items()))
    return path


@dataclass(frozen=True)
class Workshop:
    """A folder with data, recipes, runs and a model repository."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundles" / "colors" / "1"

    def arguments(self, command: str, changes: Mapping[str, object] | None = None) -> list[str]:
        """The command line of one of `RECIPES`, some of its fields changed, those changed to None left out."""
        fields = {**RECIPES[command], **(changes or {})}
        given = {field: value for field, value in fields.items() if value is not None}
        recipe = write_recipe(self.folder / f"{command}.toml", given)
        line = [command, "--recipe", str(recipe), "--runs", str(self.runs)]
        if command != "export":
            line += ["--data", str(self.folder / "data"), "--device", "cpu"]
        if command == "evaluate":
            line += ["--bundle", str(self.bundle)]
        if command == "export":
            line += ["--repository", str(self.folder / "bundles")]
        return line

    def run(self, command: str, changes: Mapping[str, object] | None = None) -> int:
        """Run a command in this process; returns its exit status."""
        return main(self.arguments(command, changes))


class Interrupted(Exception):
    """A run was stopped on purpose."""


def interrupt(task: Task, at: int, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task, which will raise instead of making step `at`."""
    step = task.step

    def step_or_stop(number: int) -> dict[str, float]:
        if number == at:
            raise Interrupted
        return step(number)

    monkeypatch.setattr(task, "step", step_or_stop)
    return task


def assert_resumes_exactly(
    make_task: Callable[[], Task], recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped twice, once far past its checkpoint, must end like one that is left alone.

    The task needs seven steps or more.
    """
    whole, stopped = folder / "whole", folder / "stopped"
    fit(Run(whole, recipe), make_task(), checkpoint_every_s=1e9, log_every=1)

    with pytest.raises(Interrupted):
        fit(Run(stopped, recipe), interrupt(make_task(), 3, monkeypatch), checkpoint_every_s=1e-9, log_every=1)
    with pytest.raises(Interrupted):
        fit(Run(stopped, recipe), interrupt(make_task(), 6, monkeypatch), checkpoint_every_s=1e9, log_every=1)
    saved = torch.load(stopped / recipe.name / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3
    fit(Run(stopped, recipe), make_task(), checkpoint_every_s=1e9, log_every=1)

    assert_same_run(whole / recipe.name, stopped / recipe.name)


def assert_same_run(one: Path, other: Path) -> None:
    """The last checkpoints and the metrics of two runs are equal, to the last bit."""
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other))
    assert first["step"] == second["step"]
    assert_same(first["state"], second["state"])
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def assert_same(one: object, other: object, where: str = "state") -> None:
    """Two states are equal, to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}.{index}")
    else:
        assert one == other, where
