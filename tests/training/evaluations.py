"""Evaluations of tiny bundles on tiny data, for tests of what evaluates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import Bundle
from tests.training.tiny import RECIPES, Workshop
from training.config import EvaluateRecipe
from training.data import ImageSet
from training.evaluate import Entry, measure
from training.evaluation import Evaluation, every_level
from training.plan import Planner
from training.progress import Progress
from training.subject import Subject


def recipe_with(**changes: Any) -> EvaluateRecipe:
    """The tiny recipe; `budget` changes are those of its parts."""
    budget = {**RECIPES["evaluate"]["budget"], **changes.pop("budget", {})}
    return EvaluateRecipe.model_validate({**RECIPES["evaluate"], "budget": budget, **changes})


def evaluation_of(bundle: Bundle, data: ImageSet, folder: Path, **changes: Any) -> Evaluation:
    return Evaluation(recipe_with(**changes), bundle, data, Progress(folder), {})


def entry_of(evaluation: Evaluation, defense: str = "none") -> Entry:
    return measure(evaluation, Subject(defense, evaluation.bundle.defended(defense)))


def report_of(workshop: Workshop) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((workshop.bundle / "report.json").read_text())
    return report


def timeless(report: Any) -> Any:
    """A report, or a part of one, without how long anything took."""
    if isinstance(report, dict):
        return {key: timeless(part) for key, part in report.items() if key not in ("cost", "wall_s", "attacks_s")}
    return [timeless(part) for part in report] if isinstance(report, list) else report


def attack_names(bundle: Bundle, defense: str, **changes: Any) -> dict[str, set[str]]:
    """By level, what a defense is attacked with."""
    recipe = recipe_with(**changes)
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {"other@1": bundle}, 3)
    attacks = every_level(planner, Subject(defense, bundle.defended(defense)))
    assert len({attack.name for attack in attacks}) == len(attacks)
    return {level: {a.name for a in attacks if a.level == level} for level in ("L1", "L2", "L3", "L4", "L5", "L6")}
