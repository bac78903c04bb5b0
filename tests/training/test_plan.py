from __future__ import annotations

from typing import Any

import pytest
import torch

from models import load_bundle
from tests.networks import with_auto
from tests.training.evaluations import attack_names, recipe_with
from tests.training.tiny import RECIPES, SIDE, Workshop
from training.budgets import BUDGETS, BudgetName
from training.config import EvaluateRecipe
from training.evaluate import with_variants
from training.evaluation import every_level
from training.plan import Planner
from training.subject import Subject


def test_every_kind_of_defense_meets_the_attacks_that_are_made_for_it(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    usual = {"L1": {"fgsm", "pgd3"}, "L3": {"full", "apgd_ce", "apgd_dlr"}, "L5": {"square", "transfer_other@1"}}
    steps = {"iterates", "smooth_steps_3"}
    assert attack_names(bundle, "none") == {**usual, "L2": set(), "L4": set(), "L6": set()}
    assert attack_names(bundle, "atop") == {**usual, "L2": {"bpda"}, "L4": {"fixed_look"}, "L6": set()}
    assert attack_names(bundle, "aid") == {**usual, "L2": {"bpda"}, "L4": {"aware_aid_1", *steps}, "L6": set()}
    assert attack_names(bundle, "zeropur")["L4"] == {"aware_zeropur_1", *steps}
    assert attack_names(bundle, "aid,zeropur")["L4"] == {"aware_aid_1", "aware_zeropur_1"}
    assert attack_names(bundle, "atop,aid")["L4"] == {"fixed_look", "aware_aid_1"}
    assert attack_names(bundle, "auto")["L4"] == {"past_gate", "aware_zeropur_1", *steps}
    behind_atop = with_auto(bundle, 0.5, cheap="atop")
    assert attack_names(behind_atop, "auto")["L4"] == {"past_gate", "aware_zeropur_1", "fixed_look", *steps}


def test_an_attack_on_one_purifier_serves_every_defense_that_has_it(finished: Workshop) -> None:
    bundle, recipe = load_bundle(finished.bundle), recipe_with()
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)

    def shared(defense: str) -> dict[str, Any]:
        attacks = every_level(planner, Subject(defense, bundle.defended(defense)))
        return {attack.name: attack.settings for attack in attacks if attack.shared and attack.level == "L4"}

    assert shared("zeropur").keys() == {"aware_zeropur_1", "iterates", "smooth_steps_3"}
    assert shared("auto") == shared("zeropur")  # its strong chain
    assert shared("atop") == {}
    assert shared("aid")["iterates"] != shared("zeropur")["iterates"]  # by what they stand on
    bundle.manifest = with_variants(bundle, {"long": {"coarse_steps": 3}})
    assert shared("zeropur:long")["iterates"] != shared("zeropur")["iterates"]


def test_a_chain_that_descends_and_draws_is_attacked_over_its_draws(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    recipe = EvaluateRecipe.model_validate({**RECIPES["evaluate"], "budget": "standard"})
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)
    attacks = {a.name: a.settings for a in every_level(planner, Subject("atop,aid", bundle.defended("atop,aid")))}
    draws = {name: attacks[name]["draws"] for name in ("full", "apgd_ce", "bpda")}
    assert draws == {"full": 10, "apgd_ce": 10, "bpda": 15}


@pytest.mark.parametrize(("classes", "known"), [(2, {"apgd_ce"}), (3, {"apgd_ce", "apgd_dlr"})])
def test_a_loss_that_two_classes_do_not_have_is_left_out(classes: int, known: set[str], finished: Workshop) -> None:
    bundle, recipe = load_bundle(finished.bundle), recipe_with()
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, classes)
    attacks = every_level(planner, Subject("none", bundle.defended("none")))
    assert {attack.name for attack in attacks if attack.name.startswith("apgd")} == known


@pytest.mark.parametrize("name", list(BUDGETS))
def test_the_budgets_run_every_level_that_the_headline_is_over(name: BudgetName, finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    for defense in ("atop", "aid", "zeropur"):
        recipe = EvaluateRecipe.model_validate({**RECIPES["evaluate"], "budget": name})
        planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)
        levels = {attack.level for attack in every_level(planner, Subject(defense, bundle.defended(defense)))}
        # Of purifiers that add signs in a ball, BPDA is the exact gradient: there L3 is L2.
        assert levels >= {"L1", "L3", "L4", "L5"} | ({"L2"} if defense == "atop" else set())


def test_each_sharpness_is_an_attack_of_its_own(finished: Workshop) -> None:
    recipe = recipe_with(budget={"descending": {"images": 4, "smooth_steps": 1, "smooth_sharpness": [1.0, 10.0]}})
    bundle = load_bundle(finished.bundle)
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)
    attacks = {attack.name: attack for attack in planner.adaptive(Subject("aid", bundle.defended("aid")))}
    assert {"smooth_steps_1", "smooth_steps_10"} <= attacks.keys()
    assert attacks["smooth_steps_10"].settings["sharpness"] == 10.0
    images, labels = torch.rand(4, 3, SIDE, SIDE), torch.zeros(4, dtype=torch.long)
    one, ten = (attacks[name].run(images, labels, range(4)) for name in ("smooth_steps_1", "smooth_steps_10"))
    assert not torch.equal(one, ten)
