from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.aid import Aid
from models.classifiers import Classifier
from tests.fakes import smooth_classifier
from tests.training.tiny import RECIPES, Workshop, assert_resumes_exactly, assert_same, color_set
from training.adversarial import vertex_mixture
from training.attacks.pgd import pgd_linf
from training.config import AidRecipe
from training.data import to_float
from training.statistics import auroc
from training.train_aid import CALIBRATED_RATES, AidTraining, threshold_name
from training.trained import frozen

CPU = torch.device("cpu")
TAPS = {"taps": ["stem", "pool"], "width": 16}


def recipe_with(**changes: Any) -> AidRecipe:
    return AidRecipe.model_validate({**RECIPES["train-aid"], "discriminator": TAPS, **changes})


def training(classifier: Classifier | None = None, **changes: Any) -> AidTraining:
    return AidTraining(recipe_with(**changes), color_set(64), classifier or frozen(smooth_classifier(), CPU), CPU)


# AVmixup


def test_a_share_of_one_gives_the_image_and_none_gives_the_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    images, generator = torch.full((3, 3, 2, 2), 0.5), torch.Generator()
    adversarial = images.clone()
    adversarial[:, 0] += 0.1
    adversarial[:, 1] -= 0.4
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1.0, 0.0, 0.25]))

    mixed, naturalness = vertex_mixture(images, adversarial, gamma=1.5, generator=generator)

    assert naturalness.tolist() == [1, 0, 0.25]
    assert torch.equal(mixed[0], images[0])
    vertex = torch.tensor([0.65, 0.0, 0.5])  # 0.5 + 1.5 * 0.1; 0.5 - 1.5 * 0.4 clipped; not attacked
    torch.testing.assert_close(mixed[1, :, 0, 0], vertex)
    torch.testing.assert_close(mixed[2, :, 0, 0], 0.25 * 0.5 + 0.75 * vertex)


def test_shares_are_uniform_one_per_image_and_drawn_by_the_generator() -> None:
    images, adversarial = torch.zeros(2000, 3, 1, 1), torch.ones(2000, 3, 1, 1)
    mixed, share = vertex_mixture(images, adversarial, gamma=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, (1 - share).view(-1, 1, 1, 1).expand(-1, 3, 1, 1))
    assert share.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.04)
    again = vertex_mixture(images, adversarial, gamma=1.0, generator=torch.Generator().manual_seed(0))[1]
    assert torch.equal(share, again)


# Training


def test_the_discriminator_learns_to_tell_and_the_loss_falls() -> None:
    task = training(epochs=12, attack_eps=0.1, attack_step_size=0.05, lr=0.05)

    losses = [task.step(step)["loss"] for step in range(task.steps)]

    assert sum(losses[-10:]) < sum(losses[:10])
    images, labels = to_float(task.batches.data.images, CPU), task.batches.data.labels
    generator = torch.Generator().manual_seed(9)
    adversarial = pgd_linf(task.classifier, images, labels, eps=0.1, steps=5, step_size=0.05, generator=generator)
    aid = Aid(task.classifier, task.discriminator.eval(), recipe_with().discriminator.taps)
    with torch.no_grad():
        assert auroc(aid(images), aid(adversarial)) > 0.7  # natural scores high: the polarity of models/aid.py


def test_the_classifier_is_never_changed_and_gets_no_gradient() -> None:
    classifier = frozen(smooth_classifier(), CPU)
    task = training(classifier)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    discriminator = {name: value.clone() for name, value in task.discriminator.state_dict().items()}
    for step in range(3):
        task.step(step)
    assert_same(dict(classifier.state_dict()), before)
    assert all(weight.grad is None for weight in classifier.parameters())
    assert not classifier.training
    assert not torch.equal(task.discriminator.state_dict()["joint.0.weight"], discriminator["joint.0.weight"])


def test_training_attacks_by_the_recipe() -> None:
    task = training(attack_eps=0.07, attack_step_size=0.03, attack_steps=4)
    images, labels = task.batches.at(0)
    adversarial = task.attack(images, labels, torch.Generator().manual_seed(0))
    assert (adversarial - images).abs().max().item() == pytest.approx(0.07, abs=1e-6)
    assert F.cross_entropy(task.classifier(adversarial), labels) > F.cross_entropy(task.classifier(images), labels)


def test_a_discriminator_that_is_stopped_ends_like_one_that_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes_exactly(training, recipe_with(), tmp_path, monkeypatch)


@pytest.mark.parametrize("rate", [0.05, 0.25])
def test_the_threshold_is_the_quantile_of_the_clean_images_scores(rate: float) -> None:
    task = training(false_positive_rate=rate)
    task.step(0)
    aid = Aid(task.classifier, task.discriminator.eval(), recipe_with().discriminator.taps)
    with torch.no_grad():
        scores = aid(to_float(task.batches.data.images, CPU)).numpy()

    found = task.summarize()
    threshold = found["threshold"]

    for calibrated in CALIBRATED_RATES:
        expected = float(np.quantile(scores, calibrated))
        assert found[threshold_name(calibrated)] == pytest.approx(expected, abs=1e-6)
    assert threshold == pytest.approx(float(np.quantile(scores, rate)), abs=1e-6)
    assert (scores < threshold).mean() == pytest.approx(rate, abs=1 / 64)


def test_a_tap_that_the_classifier_does_not_have_is_refused_before_anything_runs(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    taps = {"name": "lost", "discriminator": {"taps": ["stage1", "stage9"], "width": 16}}
    assert finished.run("train-aid", taps) == 2
    assert "stage9" in capsys.readouterr().err
    assert not (finished.runs / "lost").exists()
