from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import Bundle, Manifest, load_bundle
from models.classifiers import Classifier
from models.manifest import ClassifierSpec, Defenses
from models.randomness import derive_seed
from tests.fakes import color_classifier, linear_problem, smooth_classifier
from tests.training.tiny import CLASSES, RECIPES, SIDE, Workshop, color_set
from training.config import EvaluateRecipe
from training.data import ImageSet
from training.evaluate import (
    GREY_BOX_ONLY,
    HARMS_CLEAN,
    UNDEFENDED,
    accuracy,
    aid_scores,
    attacked_sets,
    auroc,
    binomial,
    cost,
    detection,
    head,
    measure,
    reasons,
    table,
)


def recipe_with(**changes: Any) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate({**RECIPES["evaluate"], **changes})


def bundle_of(classifier: Classifier, classes: tuple[str, ...] = CLASSES, side: int = SIDE) -> Bundle:
    """A bundle that offers no defense."""
    manifest = Manifest(
        name="plain",
        version="1",
        classes=classes,
        input_size=(side, side),
        classifier=ClassifierSpec(architecture="none"),
        defenses=Defenses(),
        default_defense="none",
    )
    return Bundle(manifest, classifier)


def report_of(workshop: Workshop) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((workshop.bundle / "report.json").read_text())
    return report


# Numbers


def test_the_accuracy_of_a_classifier_with_known_answers_is_right() -> None:
    data = color_set(20)
    labels = torch.cat([data.labels[:13], (data.labels[13:] + 1) % 3])
    known = ImageSet(data.images, labels, CLASSES)
    found = accuracy(bundle_of(color_classifier()), "none", known, recipe_with(), draws=1, what="known")
    assert (found["accuracy"], found["n"]) == (0.65, 20)


def test_the_accuracy_of_a_random_defense_is_the_mean_over_its_draws(finished: Workshop) -> None:
    bundle, data = load_bundle(finished.bundle), color_set(12, seed=3)
    recipe = recipe_with(batch_size=5)

    def right(draw: int) -> int:
        seeds = [derive_seed(recipe.seed, "evaluate", draw, index) for index in range(12)]
        images = data.images.float() / 255
        return int((bundle.probabilities("atop", images, seed=seeds).argmax(1) == data.labels).sum())

    found = accuracy(bundle, "atop", data, recipe, draws=3, what="random")

    assert found["accuracy"] == round(sum(right(draw) for draw in range(3)) / 36, 4)
    assert found["n"] == 12


@pytest.mark.parametrize(("right", "n"), [(73, 100), (0, 10), (10, 10), (359, 512)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    z, share = 1.959963985, right / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5

    found = binomial(right, n)

    assert found == {"accuracy": round(share, 4), "interval": found["interval"], "n": n}
    assert found["interval"] == pytest.approx([max(0, center - half), min(1, center + half)], abs=6e-5)


@pytest.mark.parametrize(
    ("natural", "adversarial", "expected"),
    [([0.9, 0.8, 0.4], [0.7, 0.3], 5 / 6), ([0.9, 0.8], [0.1], 1.0), ([0.1], [0.2, 0.3], 0.0), ([0.5], [0.5], 0.5)],
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(
    natural: list[float], adversarial: list[float], expected: float
) -> None:
    assert auroc(torch.tensor(natural), torch.tensor(adversarial)) == pytest.approx(expected)


def test_head_takes_the_first_images_or_all() -> None:
    data = color_set(6)
    assert torch.equal(head(data, 4).images, data.images[:4])
    assert len(head(data, 99)) == 6


def test_the_cost_is_a_multiple_of_undefended_inference(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    assert cost(bundle, "zeropur") > 2  # it makes several passes forward and back


# Attacks


@pytest.mark.parametrize(("share", "robust"), [(0.9, 1.0), (1.1, 0.0)])
def test_grey_box_accuracy_breaks_down_where_the_margin_ends(share: float, robust: float) -> None:
    problem = linear_problem(count=10, side=SIDE)
    bundle = bundle_of(problem.classifier, ("no", "yes"))
    clean = ImageSet(problem.images, problem.labels, ("no", "yes"))
    eps = share * problem.margin
    recipe = recipe_with(eps=eps, pgd_steps=30, pgd_step_size=eps / 10)

    found = measure(bundle, "none", clean, attacked_sets(bundle, clean, recipe), recipe)

    assert found["standard"]["accuracy"] == 1
    assert found["grey_box"]["fgsm"]["accuracy"] == robust
    assert found["grey_box"]["pgd30"]["accuracy"] == robust
    assert not found["credible"]
    assert found["reasons"] == [UNDEFENDED]


def test_attacked_sets_are_the_same_images_within_the_budget_and_repeat() -> None:
    bundle, clean = bundle_of(smooth_classifier()), color_set(10)
    sets = attacked_sets(bundle, clean, recipe_with(eps=0.1))
    assert sets.keys() == {"clean", "fgsm", "pgd3"}
    for name in ("fgsm", "pgd3"):
        distance = (sets[name].images - clean.images.float() / 255).abs()
        assert 0.05 < distance.max() <= 0.1 + 1e-6
        assert torch.equal(sets[name].labels, clean.labels)
    again = attacked_sets(bundle, clean, recipe_with(eps=0.1))
    other = attacked_sets(bundle, clean, recipe_with(eps=0.1, seed=8))
    assert torch.equal(sets["pgd3"].images, again["pgd3"].images)
    assert not torch.equal(sets["pgd3"].images, other["pgd3"].images)


def test_an_attack_that_leaves_its_budget_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluate.foolbox_fgsm", lambda _, images, labels, eps: images + 2 * eps)
    with pytest.raises(AssertionError, match="fgsm left its budget"):
        attacked_sets(bundle_of(smooth_classifier()), color_set(4), recipe_with())


def test_detection_counts_what_scores_below_the_threshold(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    clean, attacked = color_set(10), color_set(10, seed=4)
    threshold = bundle.manifest.aid_threshold
    natural, adversarial = (aid_scores(bundle, data, recipe_with()) for data in (clean, attacked))
    assert threshold is not None

    found = detection(bundle, {"clean": clean, "pgd": attacked}, recipe_with())

    assert found["threshold"] == threshold
    assert found["false_positive_rate"]["accuracy"] == int((natural < threshold).sum()) / 10
    assert found["attacks"]["pgd"]["detected"]["n"] == 10
    pairs = (natural[:, None] > adversarial[None, :]).float().mean().item()
    assert found["attacks"]["pgd"]["auroc"] == pytest.approx(pairs, abs=1e-4)


# The whole


def assert_measured(cell: dict[str, Any], n: int) -> None:
    assert cell.keys() == {"accuracy", "interval", "n"}
    assert cell["n"] == n
    low, high = cell["interval"]
    assert 0 <= low <= cell["accuracy"] <= high <= 1


def test_the_report_has_the_shape_of_the_contract(finished: Workshop) -> None:
    report = report_of(finished)
    assert report.keys() == {"undefended", "defenses", "detection", "recipe"}
    assert list(report["defenses"]) == ["atop", "atop:rt3", "aid", "zeropur"]
    for name, entry in [("none", report["undefended"]), *report["defenses"].items()]:
        costly = name in ("aid", "zeropur")
        assert_measured(entry["standard"], 6 if costly else 20)
        assert entry["grey_box"].keys() == {"fgsm", "pgd3"}
        for cell in entry["grey_box"].values():
            assert_measured(cell, 6 if costly else 10)
        assert entry["adaptive"] == {}  # not measured: no number, rather than a number that says nothing
        assert entry["worst_case"] is None
        assert entry["credible"] is False
        assert entry["reasons"]
        assert entry["cost"] > 0


def test_a_defense_that_is_better_under_attack_than_without_is_called_so() -> None:
    low, high = binomial(20, 100), binomial(60, 100)
    assert reasons(defended=True, standard=low, grey_box={"fgsm": low, "pgd": high}) == [GREY_BOX_ONLY, HARMS_CLEAN]
    assert reasons(defended=True, standard=high, grey_box={"fgsm": low, "pgd": high}) == [GREY_BOX_ONLY]
    assert reasons(defended=False, standard=high, grey_box={"pgd": low}) == [UNDEFENDED]


def test_the_report_says_how_to_get_it_again(finished: Workshop) -> None:
    recipe = report_of(finished)["recipe"]
    assert recipe["bundle"] == "colors@1"
    assert recipe["eps"] == 8 / 255
    assert recipe["pgd_step_size"] == 2 / 255
    assert recipe["data_sha256"] == color_set(24, seed=1).fingerprint()
    assert recipe["data_encodings"] == ["PNG"]
    weights = (finished.bundle / "classifier.safetensors").read_bytes()
    assert recipe["weights_sha256"]["classifier.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"git_commit", "libraries", "hardware", "wall_s", "seed", "batch_size"} <= recipe.keys()
    assert str(finished.folder) not in json.dumps(recipe)


def test_the_bundle_knows_its_report(finished: Workshop) -> None:
    manifest = json.loads((finished.bundle / "bundle.json").read_text())
    report = (finished.bundle / "report.json").read_bytes()
    assert manifest["files"]["report.json"] == hashlib.sha256(report).hexdigest()
    assert load_bundle(finished.bundle).report == report_of(finished)


def test_the_same_seed_gives_the_same_numbers_in_a_table(
    finished: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Workshop(tmp_path)
    shutil.copytree(finished.folder / "data", tmp_path / "data")
    shutil.copytree(finished.bundle, copy.bundle)
    before = report_of(finished)

    assert copy.run("evaluate") == 0

    printed, after = capsys.readouterr().out, report_of(copy)
    for report in (before, after):
        for entry in [report["undefended"], *report["defenses"].values()]:
            del entry["cost"]  # a time
        del report["recipe"]["wall_s"]
        del report["recipe"]["git_commit"]  # somebody may commit meanwhile
    assert before == after
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["defense", "undefended", "atop", "atop:rt3", "aid", "zeropur"]
    assert lines[0].split() == ["defense", "standard", "fgsm", "pgd3", "cost"]
    assert f"{100 * after['undefended']['standard']['accuracy']:.1f} (" in lines[1]
    assert "AUROC" in lines[6]
    assert "no evidence of robustness" in lines[7]
    assert len({len(line) for line in lines[:6]}) == 1  # the columns stand below one another


def test_a_table_without_detection_has_no_line_for_it(finished: Workshop) -> None:
    report = {key: value for key, value in report_of(finished).items() if key != "detection"}
    assert "AUROC" not in table(report)


@pytest.mark.parametrize("change", ["classes", "size"])
def test_data_of_other_classes_or_size_is_refused(
    change: str, finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished.bundle / "report.json").read_bytes()
    data = {
        **RECIPES["evaluate"]["data"],
        **({"classes": ["a", "b", "c"]} if change == "classes" else {"input_size": 4}),
    }
    assert finished.run("evaluate", {"data": data}) == 2
    assert "other classes or another input_size" in capsys.readouterr().err
    assert (finished.bundle / "report.json").read_bytes() == before


def test_a_defense_that_the_bundle_does_not_offer_is_refused_before_anything_runs(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.run("evaluate", {"defenses": ["atop", "atop:rt7"]}) == 2
    assert "defense atop has the presets rt2, rt3" in capsys.readouterr().err
