from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from models import Bundle, Manifest, load_bundle, save_bundle
from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.manifest import Defenses
from models.randomness import derive_seed, normal
from tests.fakes import bare_bundle, color_classifier, linear_classifier, linear_problem, smooth_classifier
from tests.networks import with_auto
from tests.training.tiny import CLASSES, RECIPES, SIDE, Workshop, color_set
from training import credibility, unseen
from training.__main__ import main
from training.attacks import by_foolbox, unrolled
from training.budgets import BUDGETS, BudgetName, Effort, FurtherAttack
from training.config import EvaluateRecipe, RecipeError
from training.data import ImageSet, to_float
from training.doubts import doubts
from training.evaluate import Entry, aid_scores, cost, evaluate, measure, with_variants
from training.evaluation import Evaluation, clean_work, every_level, head
from training.forecast import UnitTimes, forecast, unit_times
from training.plan import Planner
from training.progress import Progress
from training.report import below, table
from training.statistics import auroc, binomial, detection, paired
from training.subject import Subject
from training.unseen import requested

ROOT = Path(__file__).parents[2]


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


# Numbers


class Detached(nn.Module):
    """A purifier that hands no gradient back."""

    is_random = False

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images.detach()


class CalmWhenAttacked(nn.Module):
    """A purifier that draws while it is judged, and not while somebody wants its gradient."""

    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            return images
        return (images + 0.05 * normal(seeds, images.shape[1:], images.device)).clamp(0, 1)


class Clipped(nn.Module):
    """Logits that leave no [-limit, limit]."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, logits: Tensor) -> Tensor:
        return logits.clamp(-self.limit, self.limit)


def without_gradient(classifier: Classifier, images: Tensor) -> DefendedClassifier:
    return DefendedClassifier(classifier, [Detached()])


def calm_when_attacked(classifier: Classifier, images: Tensor) -> DefendedClassifier:
    return DefendedClassifier(classifier, [CalmWhenAttacked()])


def clipped(classifier: Classifier, images: Tensor) -> DefendedClassifier:
    """At what half of the images' largest logits reach."""
    with torch.no_grad():
        limit = float(classifier(images).amax(1).median())
    stages = dict(classifier.stages.items())
    stages["head"] = nn.Sequential(stages["head"], Clipped(limit))
    return DefendedClassifier(Classifier(stages).eval(), [])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (without_gradient, "100% of the input gradients are exactly zero"),
        (calm_when_attacked, "it answers differently while it is attacked and while it is judged"),
        (clipped, "the logit of the own class has no gradient for "),
    ],
)
def test_a_broken_defense_is_measured_and_called_not_credible(
    broken: Callable[[Classifier, Tensor], DefendedClassifier], reason: str, tmp_path: Path
) -> None:
    bundle, data = bare_bundle(smooth_classifier(), CLASSES, SIDE), color_set(20)
    with torch.no_grad():
        labels = bundle.classifier(data.images / 255).argmax(1)
    data = replace(data, labels=labels)
    assert entry_of(evaluation_of(bundle, data, tmp_path / "sound")).report["credible"]

    defended = broken(bundle.classifier, data.images / 255)
    report = measure(evaluation_of(bundle, data, tmp_path / "broken"), Subject("none", defended)).report

    assert report["worst_case"]["n"] > 0
    assert not report["credible"]
    assert any(reason in said for said in report["reasons"])


def test_what_is_wrong_behind_the_gate_is_said_of_the_gate(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clean images pass the gate: looked at through it alone, no defense behind it would be doubted."""
    bundle, data = load_bundle(finished.bundle), color_set(20)
    reason = "zeropur, behind the gate: 100% of the input gradients are exactly zero"
    sound = entry_of(evaluation_of(bundle, data, tmp_path / "sound", budget={"costly_images": 20}), "auto")
    assert reason not in sound.report["reasons"]

    broken, defended = DefendedClassifier(bundle.classifier, [Detached()]), bundle.defended
    monkeypatch.setattr(bundle, "defended", lambda name, **how: broken if name == "zeropur" else defended(name, **how))
    doubted = entry_of(evaluation_of(bundle, data, tmp_path / "broken", budget={"costly_images": 20}), "auto")

    assert reason in doubted.report["reasons"]
    assert not doubted.report["credible"]


def test_a_defense_that_more_steps_or_clean_images_speak_against_is_doubted(tmp_path: Path) -> None:
    data = color_set(20)
    bundle = bare_bundle(color_classifier(), CLASSES, SIDE)
    evaluation, all_right, half = evaluation_of(bundle, data, tmp_path), torch.ones(20).bool(), torch.arange(20) < 10
    subject = Subject("none", bundle.defended("none"))

    def said(*, steps: Tensor, clean: Tensor) -> list[str]:
        curve = [(1, half), (5, steps)]
        right = {"full": all_right}
        return doubts(evaluation, subject, clean=clean, right=right, levels={"full": "L3"}, against_steps=curve)

    assert said(steps=half, clean=all_right) == []
    assert "5 steps leave 100% right, 1 steps 50%" in said(steps=all_right, clean=all_right)
    assert "attacked images do better (100%) than clean ones (50%)" in said(steps=half, clean=half)


def test_the_accuracy_of_a_classifier_with_known_answers_is_right(tmp_path: Path) -> None:
    data = color_set(20)
    labels = torch.cat([data.labels[:13], (data.labels[13:] + 1) % 3])
    known = ImageSet(data.images, labels, CLASSES)
    found = entry_of(evaluation_of(bare_bundle(color_classifier(), CLASSES, SIDE), known, tmp_path)).report["standard"]
    assert (found["accuracy"], found["n"]) == (0.65, 20)


def test_the_accuracy_of_a_random_defense_is_the_mean_over_its_draws(finished: Workshop, tmp_path: Path) -> None:
    bundle, data = load_bundle(finished.bundle), color_set(12, seed=3)
    evaluation = evaluation_of(bundle, data, tmp_path)

    clean = evaluation.clean(Subject("atop", bundle.defended("atop")), 12, 3)

    assert clean.shape == (3, 12)
    for draw in range(3):
        seeds = [derive_seed(evaluation.recipe.seed, "verdict", str(draw), index) for index in range(12)]
        answers = bundle.probabilities("atop", data.images.float() / 255, seed=seeds).argmax(1)
        assert torch.equal(clean[draw], answers == data.labels)


def test_with_votes_what_is_judged_is_the_mean_of_several_draws(finished: Workshop, tmp_path: Path) -> None:
    bundle, data = load_bundle(finished.bundle), color_set(12, seed=3)
    evaluation = evaluation_of(bundle, data, tmp_path, votes=4, defenses=["atop", "zeropur"])
    once = evaluation_of(bundle, data, tmp_path, defenses=["atop", "zeropur"])

    static, atop, zeropur = evaluation.subjects()

    assert [subject.defended.votes for subject in (static, atop, zeropur)] == [1, 4, 1]
    seeds = evaluation.verdict_seeds(range(12), 0)
    images = to_float(data.images, torch.device("cpu"))
    answers = bundle.probabilities("atop", images, votes=4, seed=seeds).argmax(1)
    assert torch.equal(evaluation.clean(atop, 12, 1)[0], answers == data.labels)
    pairs = zip(evaluation.subjects(), once.subjects(), strict=True)
    same = [evaluation.asked(now) == once.asked(then) for now, then in pairs]
    assert same == [True, False, True]  # what draws nothing is not measured again


def test_findings_of_several_votes_are_not_those_of_one(finished: Workshop, tmp_path: Path) -> None:
    bundle, data = load_bundle(finished.bundle), color_set(8)
    several, one = (evaluation_of(bundle, data, tmp_path, votes=votes, defenses=["atop"]) for votes in (3, 1))
    for evaluation in (several, one):
        measure(evaluation, evaluation.subjects()[1])  # clean images, attacks, curves and checks
    assert several.used
    assert several.used.keys().isdisjoint(one.used)


def votes_asked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of the votes for which a defense purifies from now on."""
    purify, asked = DefendedClassifier.purify, set[int]()

    def recorded(self: DefendedClassifier, images: Tensor, seeds: Sequence[int], vote: int = 0) -> Tensor:
        asked.add(vote)
        return purify(self, images, seeds, vote)

    monkeypatch.setattr(DefendedClassifier, "purify", recorded)
    return asked


def test_every_attack_on_a_defense_of_several_votes_asks_for_them_all(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "square_queries": 2, "apgd_steps": 2, "unseen": True}
    budget = {**RECIPES["evaluate"]["budget"], "one_pass": effort}
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(4), tmp_path, votes=3, defenses=["atop"], budget=budget)
    monkeypatch.setattr(unseen, "STADV_STEPS", 1)
    atop, asked = evaluation.subjects()[1], votes_asked(monkeypatch)
    attacks = [attack for attack in every_level(evaluation.planner(), atop) if attack.level != "L1"]
    assert {"bpda", "full", "apgd_ce", "fixed_look", "square", "known_seed", "stadv"} <= {one.name for one in attacks}
    _, images, labels = next(evaluation.batches(4))

    for attack in attacks:
        asked.clear()
        attack.run(images, labels, range(4))
        assert asked == {0, 1, 2}, attack.name


def test_an_image_past_the_gate_meets_every_vote_of_the_cheap_chain(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_auto(load_bundle(finished.bundle), 0.5, cheap="atop")
    evaluation = evaluation_of(bundle, color_set(4), tmp_path, votes=3, defenses=["auto"])
    attacks = {attack.name: attack for attack in every_level(evaluation.planner(), evaluation.subjects()[1])}
    _, images, labels = next(evaluation.batches(4))
    asked = votes_asked(monkeypatch)
    attacks["past_gate"].run(images, labels, range(4))
    assert asked == {0, 1, 2}


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


def test_the_cost_is_a_multiple_of_undefended_inference(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path)
    defended = bundle.defended("zeropur")
    assert cost(evaluation, Subject("zeropur", defended)) > 2  # it makes several passes forward and back


# Attacks


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


def test_an_attack_that_leaves_its_budget_is_not_reported(tmp_path: Path) -> None:
    evaluation = evaluation_of(bare_bundle(smooth_classifier(), CLASSES, SIDE), color_set(4), tmp_path)
    (fgsm, *_) = evaluation.planner().grey_box(Subject("none", evaluation.bundle.defended("none")))
    far = replace(fgsm, run=lambda images, labels, numbers: (images + 0.1).clamp(0, 1))
    with pytest.raises(AssertionError, match="fgsm left its budget"):
        evaluation.attacked(far, torch.rand(2, 3, SIDE, SIDE), torch.tensor([0, 1]), [0, 1])


def test_the_verdict_uses_randomness_that_no_attack_has_seen(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seed that reaches the defense is noted, and whether it was for a verdict."""
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(8), tmp_path)
    seen, judging = {True: set[int](), False: set[int]()}, [False]
    vote, right = DefendedClassifier.vote, Evaluation.right

    def noted(self: DefendedClassifier, images: Tensor, seeds: Sequence[int], number: int) -> Tensor:
        seen[judging[0]] |= set(seeds)
        return vote(self, images, seeds, number)

    def judged(self: Evaluation, subject: Subject, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        judging[0] = True
        try:
            return right(self, subject, images, labels, seeds)
        finally:
            judging[0] = False

    monkeypatch.setattr(DefendedClassifier, "vote", noted)
    monkeypatch.setattr(Evaluation, "right", judged)
    subject = Subject("atop", bundle.defended("atop"))
    evaluation.clean(subject, 8, 2)
    for attack in evaluation.planner().adaptive(subject):
        evaluation.withstood(subject, replace(attack, images=8), tqdm(disable=True))

    assert len(seen[False]) > 100
    assert len(seen[True]) == 8 * (2 + len(evaluation.planner().adaptive(subject)))
    assert not seen[True] & seen[False]


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

    del first.report["cost"], again.report["cost"]  # a time
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
        report = json.loads(path.read_text())
        for entry in [report["undefended"], *report["defenses"].values()]:
            del entry["cost"]  # a time
        del report["recipe"]
        reports.append(report)
    assert reports[0] == reports[1]


def process(workshop: Workshop, runs: Path) -> subprocess.Popen[bytes]:
    """An evaluation that leaves the bundle alone; one thread, so that sums are added in the same order."""
    line = [*workshop.arguments("evaluate"), "--keep-report"]
    line[line.index("--runs") + 1] = str(runs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "training", *line], cwd=ROOT, env=environment)


def test_a_defense_is_known_by_its_settings_and_by_what_stands_behind_a_gate(
    finished: Workshop, tmp_path: Path
) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(4), tmp_path)
    keys = {json.dumps(evaluation.chain(name)) for name in ("none", "atop", "atop:rt3", "zeropur", "auto", "atop,aid")}
    assert len(keys) == 6
    assert evaluation.chain("atop") == evaluation.chain("atop:rt2")  # its default preset
    manifest = bundle.manifest.model_dump()
    manifest["defenses"]["zeropur"]["presets"]["code"]["coarse_steps"] = 9
    bundle.manifest = Manifest.model_validate(manifest)
    assert json.dumps(evaluation.chain("auto")) not in keys
    assert json.dumps(evaluation.chain("atop")) in keys


def test_images_that_attack_the_classifier_are_made_once_for_all_defenses(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path)
    calls = list[int]()
    fgsm = by_foolbox.foolbox_fgsm

    def counted(classifier: Classifier, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
        calls.append(len(images))
        return fgsm(classifier, images, labels, eps=eps)

    monkeypatch.setattr("training.plan.by_foolbox.foolbox_fgsm", counted)
    for defense in ("none", "atop", "atop:rt3"):
        subject = Subject(defense, bundle.defended(defense))
        evaluation.withstood(subject, evaluation.planner().grey_box(subject)[0], tqdm(disable=True))
    assert calls == [4, 4, 2]


def test_the_scores_are_those_of_clean_and_of_grey_box_images(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(10), tmp_path)
    scores = aid_scores(evaluation)
    assert scores.keys() == {"clean", "fgsm", "pgd3"}
    expected = torch.cat([bundle.aid_score(images) for _, images, _ in evaluation.batches(10)])
    assert torch.equal(scores["clean"], expected)
    assert not torch.equal(scores["fgsm"], expected)
    assert aid_scores(evaluation_of(bare_bundle(color_classifier(), CLASSES, SIDE), color_set(4), tmp_path)) == {}


def test_detection_counts_what_scores_below_the_threshold() -> None:
    clean, attacked = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.1, 0.75])
    found = detection({"clean": clean, "pgd": attacked}, 0.5)
    assert found["threshold"] == 0.5
    assert (found["false_positive_rate"]["accuracy"], found["false_positive_rate"]["n"]) == (0.25, 4)
    assert found["attacks"].keys() == {"pgd"}
    assert found["attacks"]["pgd"]["auroc"] == 6 / 8
    assert found["attacks"]["pgd"]["detected"]["accuracy"] == 0.5


# Which attacks


def names(bundle: Bundle, defense: str, **changes: Any) -> dict[str, set[str]]:
    recipe = recipe_with(**changes)
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {"other@1": bundle}, 3)
    attacks = every_level(planner, Subject(defense, bundle.defended(defense)))
    assert len({attack.name for attack in attacks}) == len(attacks)
    return {level: {a.name for a in attacks if a.level == level} for level in ("L1", "L2", "L3", "L4", "L5", "L6")}


def test_every_kind_of_defense_meets_the_attacks_that_are_made_for_it(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    usual = {"L1": {"fgsm", "pgd3"}, "L3": {"full", "apgd_ce", "apgd_dlr"}, "L5": {"square", "transfer_other@1"}}
    steps = {"iterates", "smooth_steps_3"}
    assert names(bundle, "none") == {**usual, "L2": set(), "L4": set(), "L6": set()}
    assert names(bundle, "atop") == {**usual, "L2": {"bpda"}, "L4": {"fixed_look"}, "L6": set()}
    assert names(bundle, "aid") == {**usual, "L2": {"bpda"}, "L4": {"aware_aid_1", *steps}, "L6": set()}
    assert names(bundle, "zeropur")["L4"] == {"aware_zeropur_1", *steps}
    assert names(bundle, "aid,zeropur")["L4"] == {"aware_aid_1", "aware_zeropur_1"}
    assert names(bundle, "atop,aid")["L4"] == {"fixed_look", "aware_aid_1"}
    assert names(bundle, "auto")["L4"] == {"past_gate", "aware_zeropur_1", *steps}
    behind_atop = with_auto(bundle, 0.5, cheap="atop")
    assert names(behind_atop, "auto")["L4"] == {"past_gate", "aware_zeropur_1", "fixed_look", *steps}


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


def test_images_that_attack_one_purifier_are_made_once(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[str]()

    def counted(name: str) -> None:
        usual = getattr(unrolled, name)

        def count(*given: object, **named: object) -> object:
            made.append(name)
            return usual(*given, **named)

        monkeypatch.setattr(unrolled, name, count)

    counted("over_iterates")
    counted("through_smooth_steps")
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(4), tmp_path)
    zeropur, auto = entry_of(evaluation, "zeropur"), entry_of(evaluation, "auto")
    assert made == ["over_iterates", "through_smooth_steps"]
    assert {"iterates", "smooth_steps_3"} <= zeropur.right.keys() & auto.right.keys()
    entry_of(evaluation, "aid")
    assert len(made) == 4


def test_a_chain_that_descends_and_draws_is_attacked_over_its_draws(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    recipe = EvaluateRecipe.model_validate({**RECIPES["evaluate"], "budget": "quick"})
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)
    attacks = {a.name: a.settings for a in every_level(planner, Subject("atop,aid", bundle.defended("atop,aid")))}
    assert attacks["full"]["draws"] == attacks["apgd_ce"]["draws"] == attacks["bpda"]["draws"] == 4


@pytest.mark.parametrize(("classes", "known"), [(2, {"apgd_ce"}), (3, {"apgd_ce", "apgd_dlr"})])
def test_a_loss_that_two_classes_do_not_have_is_left_out(classes: int, known: set[str], finished: Workshop) -> None:
    bundle, recipe = load_bundle(finished.bundle), recipe_with()
    planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, classes)
    attacks = every_level(planner, Subject("none", bundle.defended("none")))
    assert {attack.name for attack in attacks if attack.name.startswith("apgd")} == known


def test_unseen_threats_stay_out_of_the_worst_case(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    effort = {**RECIPES["evaluate"]["budget"]["one_pass"], "images": 3, "unseen": True}
    evaluation = evaluation_of(bundle, color_set(8), tmp_path, budget={"one_pass": effort})

    report = entry_of(evaluation, "atop").report

    assert report["unseen"].keys() == {"l2", "eps_times_0.5", "eps_times_2", "known_seed", "stadv"}
    assert not set(report["unseen"]) & set(report["worst_case"]["over"])
    assert "known_seed" not in names(bundle, "none", budget={"one_pass": effort})["L6"]  # there is none to know


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


def test_a_budget_without_efforts_is_for_grey_box_numbers_alone() -> None:
    few = {"clean_images": 4, "grey_box_images": 4, "costly_images": 4}
    fields = {**RECIPES["evaluate"], "budget": few}
    EvaluateRecipe.model_validate({**fields, "defenses": ["none"], "grey_box_only": ["atop"]})
    for defenses in (["atop"], []):
        with pytest.raises(ValidationError, match="needs one_pass and descending"):
            EvaluateRecipe.model_validate({**fields, "defenses": defenses})
    with pytest.raises(ValidationError, match="full_steps need full_draws"):
        Effort(images=2, full_steps=3)


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
    for changes in ({"zeropur_variants": {"coarse": {"fine_steps": 0}}}, {"further": FURTHER}, {"votes": 2}):
        with pytest.raises(RecipeError, match="--keep-report"):
            evaluate(recipe_with(**changes), finished.bundle, torch.device("cpu"), tmp_path)


def test_two_attacks_of_one_name_are_refused(finished: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="have one name"):
        recipe_with(further=[FURTHER[0], FURTHER[0]])
    evaluation = evaluation_of(
        load_bundle(finished.bundle), color_set(8), tmp_path, further=[{**FURTHER[0], "name": "full"}]
    )
    with pytest.raises(RecipeError, match="full: in `further`, and an attack of the budget"):
        entry_of(evaluation)


@pytest.mark.parametrize("name", list(BUDGETS))
def test_the_budgets_run_every_level_that_the_headline_is_over(name: BudgetName, finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    for defense in ("atop", "aid", "zeropur"):
        recipe = EvaluateRecipe.model_validate({**RECIPES["evaluate"], "budget": name})
        planner = Planner(bundle.classifier, recipe.effort, recipe.eps, recipe.seed, {}, 3)
        levels = {attack.level for attack in every_level(planner, Subject(defense, bundle.defended(defense)))}
        # Of purifiers that add signs in a ball, BPDA is the exact gradient: there L3 is L2.
        assert levels >= {"L1", "L3", "L4", "L5"} | ({"L2"} if defense == "atop" else set())


# The headline


def test_a_sign_test_compares_a_defense_with_its_static_model() -> None:
    defended, static = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    defended[:50], static[40:60] = True, True
    found = paired(defended, static)
    assert found == {"difference": 0.3, "better": 40, "worse": 10, "n": 100, "p_value": found["p_value"]}
    assert found["p_value"] == pytest.approx(2 * sum(math.comb(50, k) for k in range(11)) / 2**50, abs=1e-6)
    assert paired(static, static)["p_value"] == 1.0


def test_a_gate_names_every_defense_that_is_too_weak_or_not_credible() -> None:
    strong = {"worst_case": binomial(50, 100), "credible": True, "reasons": []}
    doubted = {**strong, "credible": False, "reasons": ["its gradient is zero"]}
    report = {"defenses": {"a": strong, "b": doubted}, "grey_box_only": {}, "recipe": {"grey_box_only": []}}
    assert below(report, 0.5) == ["b: not credible: its gradient is zero"]
    assert below(report, 0.6)[:2] == [
        "a: the worst case is 0.5000, below 0.6",
        "b: the worst case is 0.5000, below 0.6",
    ]
    assert below({**report, "defenses": {"a": strong}}, 0.5) == []


def test_a_gate_is_not_passed_by_what_was_not_measured() -> None:
    strong = {"worst_case": binomial(50, 100), "credible": True, "reasons": []}
    beside = {"grey_box_only": {"b": {}, "c": {}}, "recipe": {"grey_box_only": ["c"]}}
    assert below({"defenses": {"a": strong}, **beside}, 0.5) == ["b: no attack that knows it was run"]
    nothing = {"defenses": {}, "grey_box_only": {"c": {}}, "recipe": {"grey_box_only": ["c"]}}
    assert below(nothing, 0.5) == ["no defense has a worst case in this report"]


# The whole


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


def test_the_forecast_has_every_defense_and_level_and_a_sum(finished: Workshop, tmp_path: Path) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path)
    lines = forecast(evaluation, evaluation.subjects()).splitlines()
    assert lines[0].split()[-9:] == ["L0", "L1", "L2", "L3", "L4", "L5", "L6", "checks", "all"]
    assert [line.split()[0] for line in lines[1:-1]] == ["none", "atop", "atop:rt3", "aid", "zeropur"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith("In all about ")


def test_the_first_pass_of_a_process_is_not_forecast(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = [0.0], set[str]()

    def spend(what: str, images: Tensor) -> Tensor:
        clock[0] += len(images) if what in seen else 100.0
        seen.add(what)
        return images

    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path)
    monkeypatch.setattr("training.forecast.through", lambda *_, **__: lambda images: spend("gradient", images))
    monkeypatch.setattr(Evaluation, "right", lambda _, __, images, *___: spend("answer", images))
    monkeypatch.setattr("training.forecast.time.perf_counter", lambda: clock[0])
    assert unit_times(evaluation, evaluation.subjects()[0]) == UnitTimes(answer=1.0, gradient=1.0)


def test_what_serves_several_defenses_is_forecast_once(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.forecast.unit_times", lambda *_: UnitTimes(answer=60.0, gradient=0.0))
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=["zeropur", "auto"])
    rows = [line.split() for line in forecast(evaluation, evaluation.subjects()).splitlines()]
    level_4 = {row[0]: float(row[5]) for row in rows[1:-1]}
    verdicts = 4.0 * 4  # four attacks on four images
    assert level_4["zeropur"] > verdicts
    assert level_4["auto"] == verdicts


CHECKS = credibility.passes(4, is_random=False)
"""Gradients and answers for each image, where a defense descends."""


def minutes_of_checks(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, unit: UnitTimes) -> dict[str, float]:
    monkeypatch.setattr("training.forecast.unit_times", lambda *_: unit)
    rows = [line.split() for line in forecast(evaluation, evaluation.subjects()).splitlines()]
    return {row[0]: float(row[8]) for row in rows[1:-1]}


def test_the_checks_are_forecast_where_there_is_a_worst_case_and_once(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["zeropur", "auto", "atop"]
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path, defenses=names, grey_box_only=["atop:rt3"])
    minutes = minutes_of_checks(evaluation, monkeypatch, UnitTimes(answer=0.0, gradient=60.0))
    assert minutes["zeropur"] == 6 * CHECKS[0]  # of no more images than are asked about
    assert minutes["auto"] == 12 * CHECKS[0]  # those of zeropur behind it are known
    assert minutes["atop"] == 20 * credibility.passes(8, is_random=True)[0]
    assert minutes["atop:rt3"] == 0.0


def test_the_checks_of_a_gate_alone_are_those_of_what_stands_behind_it_too(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=["auto"])
    minutes = minutes_of_checks(evaluation, monkeypatch, UnitTimes(answer=60.0, gradient=0.0))
    clean, attacked = 6, 4
    assert minutes["auto"] == (12 + 6) * CHECKS[1] + clean + attacked


def test_no_checks_are_forecast_where_none_are_made(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(8), tmp_path, defenses=["none"])
    efforts = {"one_pass": Effort(images=1), "descending": Effort(images=1)}
    grey = evaluation.recipe.model_copy(update={"budget": evaluation.recipe.effort.model_copy(update=efforts)})
    minutes = minutes_of_checks(replace(evaluation, recipe=grey), monkeypatch, UnitTimes(answer=60.0, gradient=60.0))
    assert minutes == {"none": 0.0}
    assert measure(replace(evaluation, recipe=grey), evaluation.subjects()[0]).report["worst_case"] is None


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


def test_a_gate_is_forecast_by_what_attacked_images_take(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path)
    assert bundle.manifest.defenses.auto is not None
    (preset,) = bundle.manifest.defenses.auto.presets.values()
    assert preset.cheap == "none"
    expected = {"auto": preset.strong, "atop:rt3": "atop:rt3", "none": "none"}
    for name, timed in expected.items():
        assert evaluation.behind_the_gate(Subject(name, bundle.defended(name))).name == timed


def test_of_auto_as_many_clean_images_are_asked_as_of_a_cheap_defense(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(24), tmp_path)
    asked = {name: clean_work(evaluation, Subject(name, bundle.defended(name))) for name in ("atop", "auto", "zeropur")}
    assert asked == {"atop": (20, 2), "auto": (20, 1), "zeropur": (6, 1)}


def test_without_names_every_defense_of_the_bundle_is_measured(finished: Workshop, tmp_path: Path) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=())
    assert [subject.name for subject in evaluation.subjects()] == ["none", "atop", "aid", "zeropur", "auto"]


def test_the_report_says_how_to_get_it_again(finished: Workshop) -> None:
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
    before = report_of(finished)

    assert copy.run("evaluate") == 0

    printed, after = capsys.readouterr().out, report_of(copy)
    for report in (before, after):
        for entry in [report["undefended"], *report["defenses"].values()]:
            del entry["cost"]  # a time
        del report["recipe"]["wall_s"], report["recipe"]["attacks_s"], report["recipe"]["findings_of_commits"]
        del report["recipe"]["git_commit"]  # somebody may commit meanwhile
    assert before == after
    start = printed.index("defense ")
    lines = printed[start:].splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["defense", "undefended", "atop", "atop:rt3", "aid", "zeropur"]
    assert lines[0].split() == ["defense", "standard", "fgsm", "pgd3", "worst", "case", "cost", "credible"]
    assert f"{100 * after['undefended']['standard']['accuracy']:.1f} (" in lines[1]
    assert "In all about" in printed[:start]  # the forecast comes first
    assert any(line.startswith("atop:rt3: ") and "bpda" in line for line in lines)
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
