from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.randomness import generator_for
from models.speednet import WhiteningStem
from tests.fakes import color_classifier, weight_of
from tests.training.tiny import CLASSES, DATA, RECIPES, Workshop, assert_resumes_exactly, color_set
from training.attacks.pgd import pgd_linf
from training.config import ClassifierRecipe
from training.data import ImageSet, to_float
from training.provenance import fingerprint
from training.train_classifier import (
    ClassifierTraining,
    accuracy_on,
    cutmix,
    initial_classifier,
    warmup_then_cosine,
)
from training.trained import trained_classifier

CPU = torch.device("cpu")


def recipe_with(**changes: Any) -> ClassifierRecipe:
    return ClassifierRecipe.model_validate({**RECIPES["train-classifier"], **changes})


def training(**changes: Any) -> ClassifierTraining:
    return ClassifierTraining(recipe_with(**changes), color_set(48), color_set(24, seed=1), CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_average_learns_to_tell_the_colors(precision: str) -> None:
    task = training(cutmix=0.0, epochs=6, precision=precision)
    before = accuracy_on(task.average.module, task.test, CPU)

    losses = [task.step(step)["loss"] for step in range(task.steps)]

    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert task.summarize()["test_accuracy"] > max(0.9, before)


def test_a_classifier_that_is_stopped_ends_like_one_that_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes_exactly(lambda: training(epochs=1.5), recipe_with(epochs=1.5), tmp_path, monkeypatch)


ADVERSARIAL: dict[str, dict[str, Any]] = {
    "n-fgsm": {},
    "pgd": {"steps": 3, "step_size": 0.08},
    "trades": {"steps": 3, "step_size": 0.08, "beta": 3.0},
    "avmixup": {"steps": 3, "step_size": 0.08},
}


def attacked_loss(adversarial: dict[str, Any] | None) -> float:
    """The test loss under PGD of a classifier that was trained so, on images that PGD can move across."""
    task = training(adversarial=adversarial, cutmix=0.0, epochs=12, mirrored=False)
    for step in range(task.steps):
        task.step(step)
    classifier, labels = task.average.module.eval().requires_grad_(False), task.test.labels
    images, generator = to_float(task.test.images, CPU), torch.Generator().manual_seed(0)
    attacked = pgd_linf(classifier, images, labels, eps=0.12, steps=10, step_size=0.03, generator=generator)
    return F.cross_entropy(classifier(attacked), labels).item()


@pytest.fixture(scope="module")
def loss_of_plain_training() -> float:
    return attacked_loss(None)


@pytest.mark.parametrize("method", ADVERSARIAL)
def test_adversarial_training_resists_an_attack_better_than_plain_training(
    method: str, loss_of_plain_training: float
) -> None:
    assert attacked_loss({"method": method, "eps": 0.12, **ADVERSARIAL[method]}) < 0.5 * loss_of_plain_training


def test_an_adversarial_classifier_that_is_stopped_ends_like_one_that_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"epochs": 1.5, "adversarial": {"method": "avmixup", "steps": 2}}
    assert_resumes_exactly(lambda: training(**changes), recipe_with(**changes), tmp_path, monkeypatch)


def test_the_seed_decides_the_first_weights() -> None:
    one, same, other = (weight_of(training(seed=seed).classifier, "stages.head.weight") for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# The schedule and the average


def test_the_learning_rate_rises_on_a_line_and_falls_on_half_a_cosine() -> None:
    factors = [warmup_then_cosine(step, 4, 14) for step in range(15)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1
    assert factors[9] == pytest.approx(0.5)  # half way down
    assert factors[6] == pytest.approx((1 + math.cos(math.pi / 5)) / 2)
    assert factors[14] == pytest.approx(0)


def test_the_optimizer_follows_the_schedule() -> None:
    task = training(lr=0.08)  # 18 steps, the first 6 of them warm up
    rates = []
    for step in range(task.steps):
        rates.append(task.optimizer.param_groups[0]["lr"])
        task.step(step)
    assert rates == pytest.approx([0.08 * warmup_then_cosine(step, 6, 18) for step in range(18)])
    assert rates[6] == max(rates) == pytest.approx(0.08)


def test_the_average_moves_by_its_decay() -> None:
    task = training(average_decay=0.75)
    task.step(0)
    first = weight_of(task.classifier, "stages.head.weight").clone()
    task.step(1)
    second = weight_of(task.classifier, "stages.head.weight")
    average = weight_of(task.average, "module.stages.head.weight")
    assert not torch.equal(first, second)
    torch.testing.assert_close(average, 0.75 * first + 0.25 * second)


# CutMix


def batch_of_constants(count: int = 6, side: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose every pixel is their number, and one-hot targets that are all different."""
    numbers = torch.arange(count, dtype=torch.float32)
    return numbers.view(-1, 1, 1, 1).expand(-1, 3, side, side).clone(), torch.eye(count)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_replaces_one_box_and_mixes_the_targets_by_its_area(seed: int) -> None:
    images, targets = batch_of_constants()

    mixed, mixed_targets = cutmix(images, targets, torch.Generator().manual_seed(seed))

    assert torch.equal(images, batch_of_constants()[0])  # the batch itself is left alone
    replaced = mixed != images
    boxes = [box for box in replaced if box.any()]
    for box in boxes:
        assert torch.equal(box, boxes[0])  # the same box in every image that has another partner than itself
        rows, columns = box[0].any(1), box[0].any(0)
        assert torch.equal(box[0], rows[:, None] & columns[None, :])
        assert (rows.int().diff() != 0).sum() <= 2  # one piece, not two
    for index in range(len(images)):
        area = replaced[index].float().mean().item()
        assert mixed_targets[index, index].item() == pytest.approx(1 - area)
        if area:
            partner = int(mixed[index][replaced[index]][0])
            assert (mixed[index][replaced[index]] == partner).all()
            assert mixed_targets[index, partner].item() == pytest.approx(area)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(6))


def test_cutmix_boxes_come_in_all_sizes() -> None:
    images, targets = batch_of_constants(count=16, side=32)
    shares = []
    for seed in range(200):
        mixed, _ = cutmix(images, targets, torch.Generator().manual_seed(seed))
        shares.append((mixed != images).flatten(1).float().mean(1).max().item())
    quartiles = torch.tensor(shares).quantile(torch.tensor([0.25, 0.75]))
    assert quartiles[0] < 0.2
    assert quartiles[1] > 0.35
    assert max(shares) > 0.7


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 190, 200)])
def test_the_recipe_says_how_many_batches_are_mixed(share: float, least: int, most: int) -> None:
    task = training(cutmix=share)
    images, targets = batch_of_constants(side=16)
    mixed = sum(not torch.equal(task.mix(images, targets, step)[0], images) for step in range(200))
    assert least <= mixed <= most


# The beginning and the end


def test_a_fresh_classifier_normalizes_its_training_images() -> None:
    data = color_set(48)
    classifier = initial_classifier(recipe_with(), data)
    normalized = classifier.normalize(to_float(data.images, CPU))
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_a_whitening_stem_is_set_from_the_training_images_and_never_trained() -> None:
    generator = generator_for(0)
    noise = torch.randint(0, 256, (64, 3, 20, 20), dtype=torch.uint8, generator=generator)
    data = ImageSet(noise, torch.arange(64) % 3, CLASSES)
    recipe = recipe_with(architecture="speednet", data={**DATA, "input_size": 20}, batch_size=4)
    task = ClassifierTraining(recipe, data, data, CPU)
    stem = task.classifier.stages["stem"]
    assert isinstance(stem, WhiteningStem)

    projected = stem.projection(task.classifier.normalize(to_float(noise, CPU)))[:, :12]

    covariance = torch.cov(projected.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.05, rtol=0)
    before = stem.projection.weight.clone()
    task.step(0)
    assert torch.equal(stem.projection.weight, before)


def test_the_accuracy_is_the_share_that_is_right() -> None:
    data = color_set(10)
    assert accuracy_on(color_classifier(), data, CPU) == 1
    wrong = ImageSet(data.images, torch.cat([data.labels[:7], (data.labels[7:] + 1) % 3]), CLASSES)
    assert accuracy_on(color_classifier(), wrong, CPU) == pytest.approx(0.7)


# Going on from a finished run


def test_a_run_can_start_from_the_weights_of_a_finished_one(finished: Workshop) -> None:
    changes = {"name": "longer", "initial_run": "classifier", "epochs": 1, "lr": 1e-9, "warmup_epochs": 0}
    assert finished.run("train-classifier", changes) == 0

    first, second = (trained_classifier(finished.runs, name, CPU) for name in ("classifier", "longer"))
    torch.testing.assert_close(dict(second.named_parameters()), dict(first.named_parameters()))
    origin = json.loads((finished.runs / "longer" / "origin.json").read_text())
    assert origin["sha256"]["initial"] == fingerprint(first.state_dict())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architecture": "resnet9-half", "data": {**DATA, "input_size": 32}},
            "trained a wrn-16-2, not the resnet9-half",
        ),
        ({"initial_run": "nobody"}, "nobody"),
    ],
)
def test_a_run_cannot_start_from_another_kind_of_network(
    changes: dict[str, object], reason: str, finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.run("train-classifier", {"name": "odd", "initial_run": "classifier", **changes}) == 2
    assert reason in capsys.readouterr().err
