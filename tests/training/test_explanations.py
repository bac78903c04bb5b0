from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.manifest import AtopPreset
from tests.fakes import bare_bundle
from tests.networks import SIZE, sensitive, tiny_bundle, tiny_classifier
from training.explanations import left_by_the_blur, main, pgd20, restore, share_right

IMAGES = 0.2 + 0.6 * torch.rand(80, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
HIDDEN = AtopPreset(transform="rt1", working_size=SIZE, sigma=0.0, mask_ratio=0.25)


def test_the_blur_leaves_all_of_a_shade_and_nothing_of_a_checkerboard() -> None:
    classifier = sensitive(tiny_classifier(), IMAGES)
    labels = classifier(IMAGES).argmax(1)
    labels[:20] = (labels[:20] + 1) % 4
    shade = torch.tensor([0.15, -0.15, 0.1]).view(3, 1, 1).expand(3, SIZE, SIZE)
    board = 0.15 * (1 - 2 * (torch.arange(SIZE)[:, None] + torch.arange(SIZE)).remainder(2)).expand(3, SIZE, SIZE)

    shaded = left_by_the_blur(classifier, IMAGES, IMAGES + shade, labels)
    checked = left_by_the_blur(classifier, IMAGES, IMAGES + board, labels)

    last = "clean, and what the blur leaves of the attack"
    assert shaded["clean"] == checked["clean"] == 75.0
    assert shaded[last] == share_right(classifier, IMAGES + shade, labels) < 60.0
    assert checked[last] == pytest.approx(75.0, abs=4)
    assert checked["attacked, blurred"] == pytest.approx(checked["clean, blurred"], abs=4)
    assert share_right(classifier, IMAGES + board, labels) < checked[last] - 8


def test_the_attack_leaves_less_right() -> None:
    classifier = sensitive(tiny_classifier(), IMAGES)
    labels = classifier(IMAGES).argmax(1)
    attacked = pgd20(classifier, IMAGES, labels)
    assert (attacked - IMAGES).abs().max() <= 8 / 255 + 1e-6
    assert share_right(classifier, attacked, labels) < 90.0


def test_what_an_image_draws_follows_its_number() -> None:
    restored = restore(tiny_bundle(), HIDDEN, IMAGES)
    assert torch.equal(restored[:70], restore(tiny_bundle(), HIDDEN, IMAGES[:70]))
    twice = restore(tiny_bundle(), HIDDEN, IMAGES[:1].repeat(2, 1, 1, 1))
    assert not torch.allclose(twice[0], twice[1], atol=1e-3)


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_bundle_without_an_in_painter_restores_nothing() -> None:
    with pytest.raises(ValueError, match="plain has no in-painter"):
        restore(bare_bundle(tiny_classifier(), ("a", "b", "c", "d"), SIZE), HIDDEN, IMAGES)
