from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models import Bundle, load_bundle, save_bundle
from models.manifest import Defenses
from tests.training.evaluations import attack_names, entry_of, evaluation_of, recipe_with
from tests.training.tiny import RECIPES, SIDE, Workshop, color_set
from training.budgets import Effort, FurtherAttack
from training.config import RecipeError
from training.evaluate import evaluate
from training.plan import Planner
from training.subject import Subject
from training.unseen import requested, unseen


def test_unseen_threats_stay_out_of_the_worst_case(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "images": 3, "unseen": True}
    evaluation = evaluation_of(bundle, color_set(8), tmp_path, budget={"one_pass": effort})

    report = entry_of(evaluation, "atop").report

    assert report["unseen"].keys() == {"l2", "eps_times_0.5", "eps_times_2", "known_seed", "stadv"}
    assert not set(report["unseen"]) & set(report["worst_case"]["over"])
    assert {cell["n"] for cell in report["unseen"].values()} == {3}
    assert "known_seed" not in attack_names(bundle, "none", budget={"one_pass": effort})["L6"]  # there is none to know


@pytest.mark.parametrize(("unseen_images", "attacked"), [(2, 2), (9, 3), (None, 3)])
def test_a_budget_may_have_fewer_images_for_unseen_threats(
    unseen_images: int | None, attacked: int, finished: Workshop
) -> None:
    effort = Effort(images=3, full_steps=1, full_draws=1, unseen=True, unseen_images=unseen_images)
    bundle, budget = load_bundle(finished.bundle), recipe_with().effort.model_copy(update={"one_pass": effort})
    planner = Planner(bundle.classifier, budget, 8 / 255, 0, {}, 3)
    subject = Subject("atop", bundle.defended("atop"))
    assert {attack.images for attack in unseen(planner, subject)} == {attacked}
    assert {attack.images for attack in planner.adaptive(subject)} == {3}


def test_a_number_of_images_for_a_level_that_is_left_out_is_refused() -> None:
    with pytest.raises(ValidationError, match="L6, which unseen leaves out"):
        Effort(images=3, unseen_images=2)


FURTHER = [
    {"name": "pgd2_l2", "attack": "pgd", "norm": "l2", "eps": 1.0, "steps": 2, "draws": 2, "images": 3},
    {"name": "bpda_eot", "attack": "bpda", "norm": "linf", "eps": 0.1, "steps": 1, "draws": 2, "images": 2},
    {"name": "rand", "attack": "rand", "norm": "linf", "eps": 0.1, "steps": 4, "draws": 1, "images": 5},
    {"name": "moved", "attack": "stadv", "steps": 2, "draws": 1, "images": 2},
    {"name": "unseen_by_aid", "attack": "aware_aid", "norm": "linf", "eps": 0.1, "steps": 2, "draws": 1, "images": 2}
    | {"weight": 10.0},
]


def test_what_a_recipe_asks_for_is_run_on_every_defense_and_stays_out_of_the_worst_case(
    finished: Workshop, tmp_path: Path
) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(
        bundle, color_set(8), tmp_path, further=FURTHER, defenses=["atop"], grey_box_only=["zeropur"]
    )

    for defense in ("none", "atop", "zeropur"):
        report = entry_of(evaluation, defense).report
        assert {name: cell["n"] for name, cell in report["unseen"].items()} == {f["name"]: f["images"] for f in FURTHER}
        assert not set(report["unseen"]) & set((report["worst_case"] or {"over": []})["over"])
    assert report["worst_case"] is None


@pytest.mark.parametrize("wanted", FURTHER, ids=lambda wanted: str(wanted["name"]))
def test_an_attack_that_a_recipe_asks_for_does_what_it_says(wanted: dict[str, Any], finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    subject, images = Subject("atop", bundle.defended("atop")), torch.rand(3, 3, SIDE, SIDE) * 0.4 + 0.3
    planner = Planner(bundle.classifier, recipe_with().effort, 8 / 255, 0, {}, 3, bundle.aid)
    attack = requested(planner, subject, FurtherAttack.model_validate(wanted))

    changes = (attack.run(images, torch.tensor([0, 1, 2]), [0, 1, 2]) - images).flatten(1)

    if wanted["attack"] == "stadv":
        assert attack.threat is None
        assert (changes.abs().amax(1) > 0).all()
        return
    lengths = changes.norm(dim=1) if wanted["norm"] == "l2" else changes.abs().amax(1)
    reached = wanted["eps"] if wanted["attack"] == "rand" else 0.2 * wanted["eps"] * wanted["steps"]
    assert ((lengths > 0.9 * reached) & (lengths <= wanted["eps"] + 1e-5)).all()
    other = {**wanted, "attack": "pgd" if wanted["attack"] == "bpda" else "bpda", "weight": None}
    assert attack.settings != requested(planner, subject, FurtherAttack.model_validate(other)).settings


def test_the_attack_on_aid_looks_the_more_natural_the_more_that_counts(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    assert bundle.aid is not None
    planner = Planner(bundle.classifier, recipe_with().effort, 8 / 255, 0, {}, 3, bundle.aid)
    subject, images = Subject("none", bundle.defended("none")), torch.rand(6, 3, SIDE, SIDE) * 0.4 + 0.3
    scores = []
    for weight in (0.001, 1000.0):
        wanted = FurtherAttack.model_validate({**FURTHER[-1], "steps": 10, "weight": weight})
        adversarial = requested(planner, subject, wanted).run(images, torch.arange(6) % 3, list(range(6)))
        scores.append(float(bundle.aid.logits(adversarial).mean()))
    assert scores[1] > max(scores[0], float(bundle.aid.logits(images).mean()))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "standard"},
        {"eps": None},
        {"norm": None},
        {"attack": "stadv"},
        {"draws": None},
        {"weight": 1.0},
        {"attack": "aware_aid"},
        {"attack": "aware_aid", "weight": 1.0, "draws": 2},
    ],
)
def test_an_attack_that_would_be_weak_or_unclear_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FurtherAttack.model_validate({**FURTHER[0], **changes})


def test_the_attack_on_aid_needs_one(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    manifest = bundle.manifest.model_copy(update={"defenses": Defenses(), "default_defense": "none"})
    save_bundle(Bundle(manifest, bundle.classifier), tmp_path / "bundle")
    recipe = recipe_with(defenses=["none"], further=[FURTHER[-1]])
    with pytest.raises(RecipeError, match="offers aid"):
        evaluate(recipe, tmp_path / "bundle", torch.device("cpu"), tmp_path, keep_report=True)


def test_two_attacks_of_one_name_are_refused(finished: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="have one name"):
        recipe_with(further=[FURTHER[0], FURTHER[0]])
    evaluation = evaluation_of(
        load_bundle(finished.bundle), color_set(8), tmp_path, further=[{**FURTHER[0], "name": "full"}]
    )
    with pytest.raises(RecipeError, match="full: in `further`, and an attack of the budget"):
        entry_of(evaluation)
