from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import load_bundle
from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.randomness import normal
from tests.fakes import bare_bundle, color_classifier, smooth_classifier
from tests.training.evaluations import entry_of, evaluation_of
from tests.training.tiny import CLASSES, SIDE, Workshop, color_set
from training.doubts import doubts
from training.evaluate import measure
from training.subject import Subject


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
