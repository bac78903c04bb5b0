from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from models import Manifest, load_bundle
from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.randomness import derive_seed
from tests.fakes import bare_bundle, color_classifier, smooth_classifier
from tests.networks import with_auto
from tests.training.evaluations import entry_of, evaluation_of
from tests.training.tiny import CLASSES, RECIPES, SIDE, Workshop, color_set
from training import unseen
from training.attacks import by_foolbox, unrolled
from training.data import ImageSet, to_float
from training.evaluate import measure
from training.evaluation import Evaluation, clean_work, every_level, head
from training.subject import Subject


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


def test_head_takes_the_first_images_or_all() -> None:
    data = color_set(6)
    assert torch.equal(head(data, 4).images, data.images[:4])
    assert len(head(data, 99)) == 6


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


def test_of_auto_as_many_clean_images_are_asked_as_of_a_cheap_defense(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(24), tmp_path)
    asked = {name: clean_work(evaluation, Subject(name, bundle.defended(name))) for name in ("atop", "auto", "zeropur")}
    assert asked == {"atop": (20, 2), "auto": (20, 1), "zeropur": (6, 1)}


def test_without_names_every_defense_of_the_bundle_is_measured(finished: Workshop, tmp_path: Path) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=())
    assert [subject.name for subject in evaluation.subjects()] == ["none", "atop", "aid", "zeropur", "auto"]
