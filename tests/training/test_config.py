from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.fakes import color_classifier
from tests.training.tiny import DATA, INPAINTER, MAE, RECIPES, SIDE, TRANSFORM, write_recipe
from training.__main__ import RECIPES as KINDS
from training.budgets import Effort
from training.config import (
    ClassifierRecipe,
    EvaluateRecipe,
    ExportRecipe,
    FinetuneRecipe,
    RecipeError,
    refuse_unknown_layers,
)
from training.reading import read_recipe

NO_PADDING = {"padding": 0}


@pytest.mark.parametrize("command", RECIPES)
def test_what_a_recipe_says_is_what_is_read(command: str, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path / "r.toml", RECIPES[command]), KINDS[command])
    resolved = recipe.model_dump(mode="json")
    for field, value in RECIPES[command].items():
        if not isinstance(value, dict):
            assert resolved[field] == value


def test_defaults_are_the_papers_where_a_recipe_is_silent(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path / "r.toml", RECIPES["finetune-atop"]), FinetuneRecipe)
    assert recipe.classification_weight == 0.1
    assert recipe.attack_eps == 8 / 255
    assert recipe.transform.mask_ratio == 0.25
    assert recipe.gan_gradient


def test_the_data_source_can_be_given_beside_the_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.toml", RECIPES["train-classifier"])
    assert read_recipe(path, ClassifierRecipe).data.source == "nowhere"
    assert read_recipe(path, ClassifierRecipe, data_source="elsewhere").data.source == "elsewhere"


def test_there_is_no_in_painter_of_another_classifier_without_an_in_painter() -> None:
    fields = {name: value for name, value in RECIPES["export"].items() if not name.startswith("atop_")}
    bare = {**fields, "default_defense": "none"}
    ExportRecipe.model_validate(bare)
    with pytest.raises(ValidationError, match="atop_of_another needs an atop_run"):
        ExportRecipe.model_validate({**bare, "atop_of_another": True})


@pytest.mark.parametrize(
    ("command", "changes", "field", "reason"),
    [
        ("train-classifier", {"lr": -1}, "lr", "greater than 0"),
        ("train-classifier", {"lr": "fast"}, "lr", "valid number"),
        ("train-classifier", {"learning_rate": 0.1}, "learning_rate", "not permitted"),
        ("train-classifier", {"name": "../escape"}, "name", "pattern"),
        ("train-classifier", {"seed": 2**64}, "seed", "less than"),
        ("train-classifier", {"precision": "float16"}, "precision", "'bfloat16' or 'float32'"),
        ("train-classifier", {"architecture": "alexnet"}, "recipe", "unknown architecture 'alexnet'"),
        ("train-classifier", {"architecture": "speednet"}, "recipe", "at least 18 pixels"),
        ("train-classifier", {"warmup_epochs": 3}, "recipe", "warmup_epochs"),
        ("train-classifier", {"data": {**DATA, "input_size": 0}}, "data.input_size", "greater than 0"),
        ("train-classifier", {"average_decay": 1.0}, "average_decay", "less than 1"),
        ("train-classifier", {"momentum": 0.0}, "momentum", "greater than 0"),
        ("train-classifier", {"adversarial": {"method": "free"}}, "adversarial", "does not match any of the expected"),
        ("train-classifier", {"adversarial": {"method": "pgd", "eps": 0.0}}, "adversarial.pgd.eps", "greater than 0"),
        (
            "train-classifier",
            {"adversarial": {"method": "n-fgsm", "steps": 3}},
            "adversarial.n-fgsm.steps",
            "not permitted",
        ),
        ("train-classifier", {"augmentation": {"crop_scale": [0.25, 1]}}, "augmentation", "set padding to 0"),
        ("train-classifier", {"augmentation": {**NO_PADDING, "crop_scale": [1, 0.5]}}, "augmentation", "in this order"),
        ("train-classifier", {"augmentation": {"crop_scale": [0, 1]}}, "augmentation.crop_scale.0", "greater than 0"),
        ("train-classifier", {"augmentation": {"padding": -1}}, "augmentation.padding", "greater than or equal to 0"),
        ("train-classifier", {"augmentation": {"grey": 1.5}}, "augmentation.grey", "less than or equal to 1"),
        ("train-classifier", {"augmentation": {"sharpen": 1}}, "augmentation.sharpen", "not permitted"),
        ("train-classifier", {"augmentation": {"jitter": {"hue": 0.6}}}, "augmentation.jitter.hue", "equal to 0.5"),
        ("train-classifier", {"augmentation": {"jitter": {"hue": 0.1}}}, "augmentation.jitter.contrast", "required"),
        ("train-classifier", {"augmentation": {"blur": {"sigma": [2, 1]}}}, "augmentation.blur", "in this order"),
        ("train-classifier", {"augmentation": {"blur": {"sigma": [0, 1]}}}, "augmentation.blur.sigma.0", "than 0"),
        (
            "train-classifier",
            {"augmentation": {"solarize": {"probability": 0}}},
            "augmentation.solarize.probability",
            "greater than 0",
        ),
        ("pretrain-purifier", {"transform": {**TRANSFORM, "transform": "rt1"}}, "transform", "sigma must be 0"),
        ("pretrain-purifier", {"transform": {**TRANSFORM, "cells_per_side": 3}}, "transform", "cells_per_side"),
        ("pretrain-purifier", {"inpainter": {**INPAINTER, "space_to_depth": 4}}, "recipe", "multiple of 16"),
        ("pretrain-purifier", {"inpainter": {"architecture": "deepfill", "width": 6}}, "recipe", "multiple of 4"),
        ("pretrain-purifier", {"inpainter": {**MAE, "patch_size": 4}}, "recipe", "multiple of 16"),
        ("pretrain-purifier", {"inpainter": {**MAE, "heads": 5}}, "inpainter.mae", "divisible by its heads"),
        ("pretrain-purifier", {"reconstruction": "huber"}, "reconstruction", "'l1' or 'mse'"),
        ("pretrain-purifier", {"transform": {**TRANSFORM, "working_size": SIDE // 2}}, "recipe", "must not be smaller"),
        ("pretrain-purifier", {"classifier_run": "classifier"}, "classifier_run", "not permitted"),
        ("finetune-atop", {"attacked_fraction": 1.5}, "attacked_fraction", "less than or equal to 1"),
        ("finetune-atop", {"classification_from_epoch": 1}, "recipe", "classification_from_epoch"),
        ("finetune-atop", {"reconstruction_target": "both"}, "reconstruction_target", "'clean' or 'input'"),
        ("train-aid", {"discriminator": {"taps": ["stage1"]}}, "discriminator.taps.1", "required"),
        ("export", {"version": "0"}, "version", "pattern"),
        ("export", {"atop_default_preset": "rt1"}, "recipe", "atop_default_preset 'rt1'"),
        ("export", {"aid_presets": {}}, "recipe", "aid_run and aid_presets need each other"),
        ("export", {"default_defense": "atop:rt9"}, "recipe", "default_defense 'atop:rt9'"),
        ("evaluate", {"eps": 0}, "eps", "greater than 0"),
        ("evaluate", {"grey_box_only": ["atop:rt3"]}, "recipe", "atop:rt3: in defenses and in grey_box_only"),
        ("evaluate", {"budget": "lavish"}, "budget", "a budget is quick, standard, paper, or a table"),
    ],
)
def test_a_wrong_or_contradictory_field_is_named_with_its_file(
    command: str, changes: dict[str, Any], field: str, reason: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "wrong.toml", {**RECIPES[command], **changes})
    with pytest.raises(RecipeError) as refused:
        read_recipe(path, KINDS[command])
    lines = str(refused.value).splitlines()
    assert "wrong.toml" in lines[0]
    assert any(line.startswith(f"  {field}: ") and reason in line for line in lines[1:]), lines


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (command, field)
        for command in RECIPES
        for field in ("data", "batch_size", "classifier_run")
        if field in RECIPES[command] and (command, field) != ("evaluate", "batch_size")
    ],
)
def test_a_missing_field_is_named(command: str, field: str, tmp_path: Path) -> None:
    fields = {key: value for key, value in RECIPES[command].items() if key != field}
    with pytest.raises(RecipeError, match=f"  {field}: Field required"):
        read_recipe(write_recipe(tmp_path / "r.toml", fields), KINDS[command])


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.toml", {**RECIPES["train-aid"], "batch_size": 0, "gamma": 0})
    with pytest.raises(RecipeError, match=r"(?s)batch_size: .*gamma: "):
        read_recipe(path, KINDS["train-aid"])


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe"], ids=["missing", "not TOML", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"broken\.toml"):
        read_recipe(path, ClassifierRecipe)


def test_reading_a_recipe_draws_nothing(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    read_recipe(write_recipe(tmp_path / "r.toml", RECIPES["train-classifier"]), ClassifierRecipe)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_are_refused_by_name() -> None:
    refuse_unknown_layers(color_classifier(), ["pool"])
    with pytest.raises(RecipeError, match="stage9"):
        refuse_unknown_layers(color_classifier(), ["pool", "stage9"])


def test_recipes_are_frozen() -> None:
    recipe = ClassifierRecipe.model_validate(RECIPES["train-classifier"])
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lr = 1.0  # type: ignore[misc]


def test_a_budget_without_efforts_is_for_grey_box_numbers_alone() -> None:
    few = {"clean_images": 4, "grey_box_images": 4, "costly_images": 4}
    fields = {**RECIPES["evaluate"], "budget": few}
    EvaluateRecipe.model_validate({**fields, "defenses": ["none"], "grey_box_only": ["atop"]})
    for defenses in (["atop"], []):
        with pytest.raises(ValidationError, match="needs one_pass and descending"):
            EvaluateRecipe.model_validate({**fields, "defenses": defenses})
    with pytest.raises(ValidationError, match="full_steps need full_draws"):
        Effort(images=2, full_steps=3)
