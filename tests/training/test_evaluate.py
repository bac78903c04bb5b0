from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from models import load_bundle
from tests.fakes import bare_bundle, color_classifier, linear_classifier, linear_problem
from tests.training.evaluations import entry_of, evaluation_of, recipe_with, report_of, timeless
from tests.training.tiny import CLASSES, RECIPES, SIDE, Workshop, color_set
from training.__main__ import main
from training.config import RecipeError
from training.data import ImageSet
from training.evaluate import aid_scores, cost, evaluate, measure, with_variants
from training.evaluation import every_level
from training.subject import Subject

ROOT = Path(__file__).parents[2]


def test_the_cost_is_a_multiple_of_undefended_inference(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path)
    defended = bundle.defended("zeropur")
    assert cost(evaluation, Subject("zeropur", defended)) > 2  # it makes several passes forward and back


@pytest.mark.parametrize(("share", "robust"), [(0.9, 1.0), (1.1, 0.0)])
def test_every_accuracy_breaks_down_where_the_margin_ends(share: float, robust: float, tmp_path: Path) -> None:
    problem = linear_problem(count=12, side=SIDE)
    state = problem.classifier.state_dict()
    weight, bias = state["stages.head.weight"] / 5, state["stages.head.bias"] / 5
    classifier = linear_classifier(  # a third class that nothing reaches, for the losses that want one
        torch.cat([weight, torch.zeros_like(weight[:1])]), torch.cat([bias, torch.tensor([-1e3])])
    )
    eps = share * problem.margin
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "images": 12, "full_steps": 12, "apgd_steps": 12}
    budget = {"grey_box": ["fgsm", "pgd30", "mim", "deepfool"], "one_pass": effort}
    data = ImageSet(problem.images, problem.labels, ("no", "yes", "never"))
    evaluation = evaluation_of(bare_bundle(classifier, data.classes, SIDE), data, tmp_path, eps=eps, budget=budget)

    found = entry_of(evaluation).report

    assert found["standard"]["accuracy"] == 1
    for name in ("fgsm", "pgd30", "deepfool"):
        assert found["grey_box"][name]["accuracy"] == robust
    for name in ("full", "apgd_ce", "apgd_dlr"):
        assert found["adaptive"][name]["accuracy"] == robust
    assert found["worst_case"]["accuracy"] == robust
    assert found["credible"], found["reasons"]


def test_the_worst_case_is_what_withstood_every_attack_and_no_attack(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20, seed=2), tmp_path, eps=0.15)
    subject = Subject("atop", bundle.defended("atop"))

    entry = measure(evaluation, subject)

    attacks = every_level(evaluation.planner(), subject)
    bar = tqdm(disable=True)
    survived = evaluation.clean(subject, 20, 1)[0][:6]
    for attack in attacks:
        survived &= evaluation.withstood(subject, attack, bar)[:6]
    assert torch.equal(entry.survived, survived)
    worst = entry.report["worst_case"]
    assert worst["n"] == 6
    assert worst["accuracy"] == pytest.approx(float(survived.float().mean()), abs=1e-4)
    assert worst["over"] == ["clean", *(attack.name for attack in attacks)]


def test_of_some_defenses_only_what_needs_no_knowledge_of_them_is_measured(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    budget = {"grey_box": ["fgsm", "cw"]}
    evaluation = evaluation_of(
        bundle, color_set(8), tmp_path, defenses=("atop",), grey_box_only=("atop:rt3",), budget=budget
    )
    assert [subject.name for subject in evaluation.subjects()][-1] == "atop:rt3"

    report = entry_of(evaluation, "atop:rt3").report

    assert report["grey_box"].keys() == {"fgsm", "cw"}
    assert (report["adaptive"], report["unseen"], report["curves"]) == ({}, {}, {})
    assert report["worst_case"] is None
    assert report["reasons"] == ["no attack that knows the defense was run"]


def test_an_attack_without_a_bound_stays_out_of_the_worst_case(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(8), tmp_path, budget={"grey_box": ["fgsm", "cw", "pgd_l2"]})
    report = entry_of(evaluation, "atop").report
    assert not {"cw", "pgd_l2"} & set(report["worst_case"]["over"])
    assert "fgsm" in report["worst_case"]["over"]


def test_what_was_found_is_not_measured_again(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, data = load_bundle(finished.bundle), color_set(20, seed=2)
    first = entry_of(evaluation_of(bundle, data, tmp_path), "aid")

    def never(*arguments: object, **named: object) -> Tensor:
        raise RuntimeError("it ran again")

    for module in ("by_autoattack.apgd", "by_autoattack.square", "by_foolbox.foolbox_pgd", "gradients.through"):
        monkeypatch.setattr(f"training.plan.{module}", never)
    again = entry_of(evaluation_of(bundle, data, tmp_path), "aid")

    assert again.report == first.report
    with pytest.raises(RuntimeError, match="it ran again"):
        entry_of(evaluation_of(bundle, data, tmp_path, seed=5), "aid")


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_an_evaluation_gives_the_same_report_in_the_end(
    finished: Workshop, tmp_path: Path
) -> None:
    whole = process(finished, tmp_path / "whole")
    assert whole.wait() == 0

    killed, findings = process(finished, tmp_path / "killed"), tmp_path / "killed/evaluations/colors-1/findings.jsonl"
    while not findings.exists() or len(findings.read_text().splitlines()) < 20:
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    found = findings.read_text().splitlines()[:-1]
    assert process(finished, tmp_path / "killed").wait() == 0

    lines = findings.read_text().splitlines()
    assert lines[: len(found)] == found  # none was measured again
    keys = [json.loads(line)["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    reports = []
    for runs in ("whole", "killed"):
        (path,) = (tmp_path / runs / "evaluations" / "colors-1").glob("*.json")
        report = timeless(json.loads(path.read_text()))
        del report["recipe"]
        reports.append(report)
    assert reports[0] == reports[1]


def process(workshop: Workshop, runs: Path) -> subprocess.Popen[bytes]:
    """An evaluation that leaves the bundle alone; one thread, so that sums are added in the same order."""
    line = [*workshop.arguments("evaluate"), "--keep-report"]
    line[line.index("--runs") + 1] = str(runs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "training", *line], cwd=ROOT, env=environment)


def test_the_scores_are_those_of_clean_and_of_grey_box_images(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(10), tmp_path)
    scores = aid_scores(evaluation)
    assert scores.keys() == {"clean", "fgsm", "pgd3"}
    expected = torch.cat([bundle.aid_score(images) for _, images, _ in evaluation.batches(10)])
    assert torch.equal(scores["clean"], expected)
    assert not torch.equal(scores["fgsm"], expected)
    assert aid_scores(evaluation_of(bare_bundle(color_classifier(), CLASSES, SIDE), color_set(4), tmp_path)) == {}


def test_variants_of_zeropur_are_the_default_preset_with_some_fields_changed(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    manifest, varied = bundle.manifest, with_variants(bundle, {"coarse": {"fine_steps": 0}})
    assert varied.defenses.zeropur is not None
    assert manifest.defenses.zeropur is not None
    usual = manifest.defenses.zeropur.presets["code"]
    assert varied.defenses.zeropur.presets == {"code": usual, "coarse": usual.model_copy(update={"fine_steps": 0})}
    assert varied.resolve("zeropur:coarse") == "zeropur:coarse"


@pytest.mark.parametrize(
    ("variants", "reason"),
    [
        ({"code": {"fine_steps": 0}}, "a preset code already"),
        ({"new": {"fine_steps": -1}}, "fine_steps"),
        ({"new": {"speed": 1}}, "speed"),
        ({"new": {"coarse_layers": ["stage9"]}}, "stage9"),
    ],
)
def test_variants_that_make_no_preset_are_refused(
    variants: dict[str, dict[str, object]], reason: str, finished: Workshop
) -> None:
    with pytest.raises(RecipeError, match=reason):
        with_variants(load_bundle(finished.bundle), variants)
    with pytest.raises(RecipeError, match="a bundle that offers zeropur"):
        with_variants(bare_bundle(color_classifier(), CLASSES, SIDE), variants)


def test_a_report_of_what_the_bundle_does_not_do_by_default_is_not_written_into_it(
    finished: Workshop, tmp_path: Path
) -> None:
    further = [{"name": "moved", "attack": "stadv", "steps": 2, "draws": 1, "images": 2}]
    for changes in ({"zeropur_variants": {"coarse": {"fine_steps": 0}}}, {"further": further}, {"votes": 2}):
        with pytest.raises(RecipeError, match="--keep-report"):
            evaluate(recipe_with(**changes), finished.bundle, torch.device("cpu"), tmp_path)


def assert_measured(cell: dict[str, Any], n: int) -> None:
    assert {"accuracy", "interval", "n"} <= cell.keys()
    assert cell["n"] == n
    low, high = cell["interval"]
    assert 0 <= low <= cell["accuracy"] <= high <= 1


def test_the_report_has_the_shape_of_the_contract(finished: Workshop) -> None:
    report = report_of(finished)
    assert report.keys() == {"undefended", "defenses", "grey_box_only", "detection", "recipe"}
    assert list(report["defenses"]) == ["atop", "atop:rt3", "aid", "zeropur"]
    for name, entry in [("none", report["undefended"]), *report["defenses"].items()]:
        costly = name in ("aid", "zeropur")
        assert_measured(entry["standard"], 6 if costly else 20)
        assert entry["grey_box"].keys() == {"fgsm", "pgd3"}
        for cell in entry["grey_box"].values():
            assert_measured(cell, 6 if costly else 10)
        for cell in (*entry["adaptive"].values(), entry["worst_case"]):
            assert_measured(cell, 4 if costly else 6)
        assert entry["worst_case"]["accuracy"] <= min(cell["accuracy"] for cell in entry["adaptive"].values())
        assert entry["credible"] is (not entry["reasons"])
        assert entry["cost"] > 0
        assert ("against_static" in entry) == (name != "none")


def test_the_copy_of_the_report_also_says_what_each_image_withstood(finished: Workshop) -> None:
    report = report_of(finished)
    copy = json.loads((finished.runs / "evaluations" / "colors-1" / "report.json").read_text())
    outcomes = copy.pop("outcomes")
    assert copy == report
    assert outcomes.keys() == {"none", *report["defenses"]}
    for name, entry in [("none", report["undefended"]), *report["defenses"].items()]:
        cells = {**entry["grey_box"], **entry["adaptive"]}
        if name in ("none", "zeropur", "aid"):  # the others' clean images were asked about several times
            cells["standard"] = entry["standard"]
        assert outcomes[name].keys() == cells.keys()
        for what, digits in outcomes[name].items():
            assert len(digits) == cells[what]["n"]
            assert digits.count("1") == round(cells[what]["accuracy"] * len(digits))


def test_a_point_of_both_curves_is_measured_once(finished: Workshop, tmp_path: Path) -> None:
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "curve_images": 3, "curve_eps": [1.0], "curve_steps": [2]}
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(8), tmp_path, budget={"one_pass": effort})
    curves = entry_of(evaluation).report["curves"]
    assert curves["eps"][0]["accuracy"] == curves["steps"][0]["accuracy"]
    lines = (tmp_path / "findings.jsonl").read_text().splitlines()
    assert sum("curve_eps_1_steps_2" in line for line in lines) == 1
    assert len(evaluation.used) == len(lines)


def test_only_a_defense_that_draws_has_a_curve_against_draws(finished: Workshop, tmp_path: Path) -> None:
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "curve_images": 3, "curve_steps": [2], "curve_draws": [1, 3]}
    budget = {"one_pass": effort, "descending": effort}
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(8), tmp_path, budget=budget)
    assert [point["draws"] for point in entry_of(evaluation, "atop").report["curves"]["draws"]] == [1, 3]
    findings = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    spent = {found["of"]["settings"]["draws"] for found in findings if "curve" in found["of"].get("attack", "")}
    assert {1, 3} <= spent
    assert "draws" not in entry_of(evaluation, "none").report["curves"]
    assert "draws" not in entry_of(evaluation, "zeropur").report["curves"]


def test_the_report_says_how_to_get_it_again(finished: Workshop, tmp_path: Path) -> None:
    recipe = report_of(finished)["recipe"]
    assert recipe["bundle"] == "colors@1"
    assert recipe["eps"] == 8 / 255
    assert recipe["budget"]["grey_box"] == ["fgsm", "pgd3"]
    assert recipe["budget_name"] is None
    assert recipe["data_sha256"] == color_set(24, seed=1).fingerprint()
    assert recipe["data_encodings"] == ["PNG"]
    weights = (finished.bundle / "classifier.safetensors").read_bytes()
    assert recipe["weights_sha256"]["classifier.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert recipe["findings_of_commits"] == [recipe["git_commit"]]
    found = (finished.runs / "evaluations" / "colors-1" / "findings.jsonl").read_text().splitlines()
    chain = evaluation_of(load_bundle(finished.bundle), color_set(4), tmp_path).chain("atop")
    for group in ("grey_box", "adaptive"):
        for name, cell in report_of(finished)["defenses"]["atop"][group].items():
            of_it = {"attack": name, **chain}.items()
            own = [each["wall_s"] for each in map(json.loads, found) if of_it <= each["of"].items()]
            assert cell["wall_s"] == round(sum(own), 1)
            assert len(own) == -(-cell["n"] // 4)  # one for every batch of the tiny recipe
    assert 0 < recipe["attacks_s"] <= recipe["wall_s"]
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
    before = timeless(report_of(finished))

    assert copy.run("evaluate") == 0

    printed, after = capsys.readouterr().out, timeless(report_of(copy))
    for report in (before, after):
        del report["recipe"]["findings_of_commits"], report["recipe"]["git_commit"]  # somebody may commit meanwhile
    assert before == after
    start = printed.index("defense ")
    lines = printed[start:].splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["defense", "undefended", "atop", "atop:rt3", "aid", "zeropur"]
    assert lines[0].split() == ["defense", "standard", "fgsm", "pgd3", "worst", "case", "cost", "credible"]
    assert f"{100 * after['undefended']['standard']['accuracy']:.1f} (" in lines[1]
    assert "In all about" in printed[:start]  # the forecast comes first
    assert any(line.startswith("atop:rt3: ") and "bpda" in line for line in lines)
    against = after["defenses"]["atop"]["against_static"]
    said = lines[next(number for number, line in enumerate(lines) if line.startswith("atop: ")) + 1]
    assert f"{against['better']} images better and {against['worse']} worse, p {against['p_value']:.2g}" in said
    assert "AUROC" in lines[-2]
    assert "no evidence of robustness" in lines[-1]


def test_a_gate_ends_with_1_and_a_kept_report_stays(
    finished: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Workshop(tmp_path)
    shutil.copytree(finished.folder / "data", tmp_path / "data")
    shutil.copytree(finished.bundle, copy.bundle)
    before = (copy.bundle / "report.json").read_bytes()
    gate = ["--fail-below", "1", "--keep-report", "--defense", "atop:rt3"]

    assert main([*copy.arguments("evaluate"), *gate]) == 1

    said = capsys.readouterr()
    assert any(line.startswith("atop:rt3: the worst case is ") for line in said.err.splitlines())
    assert "zeropur" not in said.err
    assert "worst case" in said.out
    assert (copy.bundle / "report.json").read_bytes() == before


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
