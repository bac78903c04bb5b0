from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import load_bundle, transforms
from models.classifiers import Classifier
from models.mae import MaskedAutoencoder
from models.randomness import generator_for
from tests.fakes import smooth_classifier
from tests.training.tiny import (
    CLASSES,
    MAE,
    RECIPES,
    TRANSFORM,
    Workshop,
    assert_resumes_exactly,
    assert_same,
    color_set,
)
from training.config import FinetuneRecipe, PretrainRecipe
from training.data import ImageSet, to_float
from training.train_purifier import PurifierTraining, sum_l1, sum_mse
from training.trained import frozen, trained_inpainter

CPU = torch.device("cpu")
WORKING = {**TRANSFORM, "working_size": 16}


def pretraining_recipe(**changes: Any) -> PretrainRecipe:
    return PretrainRecipe.model_validate({**RECIPES["pretrain-purifier"], **changes})


def pretraining(**changes: Any) -> PurifierTraining:
    return PurifierTraining(pretraining_recipe(**changes), color_set(48), CPU)


def finetuning(classifier: Classifier | None = None, **changes: Any) -> PurifierTraining:
    recipe = FinetuneRecipe.model_validate({**RECIPES["finetune-atop"], **changes})
    return PurifierTraining(recipe, color_set(48), CPU, classifier or frozen(smooth_classifier(), CPU))


def gradients(task: PurifierTraining, step: int = 0) -> list[Tensor]:
    """What the in-painter's weights received in one step."""
    task.step(step)
    return [weight.grad.clone() for weight in task.purifier.inpainter.parameters() if weight.grad is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Both stages


def test_the_in_painter_learns_to_fill_what_is_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(0, 256, (48, 3, 1, 1), generator=generator).to(torch.uint8).expand(-1, -1, 8, 8).contiguous()
    data = ImageSet(plain, torch.zeros(48, dtype=torch.int64), CLASSES)
    recipe = pretraining_recipe(
        epochs=6,
        lr=5e-3,
        betas=(0.9, 0.99),
        gan_weight=0,
        inpainter={"architecture": "unet", "width": 16},
        transform={**TRANSFORM, "sigma": 0.0},
    )
    task = PurifierTraining(recipe, data, CPU)
    losses = [task.step(step)["l1"] for step in range(task.steps)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_a_deepfill_of_two_stages_learns_both_and_purifies() -> None:
    task = finetuning(inpainter={"architecture": "deepfill", "width": 4}, transform=WORKING, gan_weight=0.01)
    assert gradients(task)
    before = [weight.detach().clone() for weight in task.purifier.inpainter.parameters()]
    losses = task.step(1)
    changed = [not torch.equal(*pair) for pair in zip(before, task.purifier.inpainter.parameters(), strict=True)]
    images, _ = task.batches.at(2)

    with torch.no_grad():
        purified = task.purifier(images, list(range(len(images))))

    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(changed)
    assert purified.shape == images.shape
    assert 0 <= float(purified.min()) <= float(purified.max()) <= 1


def test_the_loss_is_the_l1_of_every_stage_on_the_papers_scale() -> None:
    target = torch.rand(2, 3, 4, 4)
    assert sum_l1([target + 0.1, target - 0.2], target).item() == pytest.approx(2 * (0.1 + 0.2), abs=1e-6)


def test_or_the_squared_error_of_every_stage_where_the_recipe_says_so() -> None:
    target = torch.rand(2, 3, 4, 4)
    assert sum_mse([target + 0.1, target - 0.2], target).item() == pytest.approx(0.2**2 + 0.4**2, abs=1e-6)

    absolute, squared = pretraining(gan_weight=0), pretraining(gan_weight=0, reconstruction="mse")
    assert squared.step(0).keys() == {"mse"}
    assert not same(gradients(absolute), gradients(squared))


@pytest.mark.parametrize("transform", ["rt2", "rt3"])
def test_the_transform_hides_the_stated_share_of_noisy_images(transform: str) -> None:
    task = pretraining(transform={**TRANSFORM, "transform": transform, "sigma": 0.1})
    images, _ = task.batches.at(0)

    mask, hidden = task.transform(images, 0)

    assert (mask.flatten(1).mean(1) == 0.25).all()
    assert (hidden[mask.expand_as(hidden) == 1] == transforms.MISSING).all()
    noise = (hidden - images)[mask.expand_as(hidden) == 0]
    assert noise.std().item() == pytest.approx(0.1, rel=0.15)  # a little is lost where it is clipped
    assert len({tuple(one.flatten().tolist()) for one in mask}) > 1  # every image has a mask of its own
    assert torch.equal(task.transform(images, 0)[1], hidden)
    assert not torch.equal(task.transform(images, 1)[1], hidden)


def test_the_discriminator_learns_and_is_not_trained_by_the_in_painters_loss() -> None:
    task = pretraining(epochs=4, discriminator_width=8, lr=5e-3)
    losses = [task.step(step)["discriminator"] for step in range(task.steps)]
    assert sum(losses[-6:]) < sum(losses[:6])

    alone, beside = pretraining(gan_weight=1e-9), pretraining(gan_weight=1.0)
    alone.step(0)
    beside.step(0)
    assert_same(dict(alone.discriminator.state_dict()), dict(beside.discriminator.state_dict()))


def test_the_gan_gradient_reaches_the_in_painter_unless_the_recipe_keeps_it_off() -> None:
    without = gradients(pretraining(gan_weight=0))
    assert same(gradients(pretraining(gan_weight=5.0, gan_gradient=False)), without)
    assert not same(gradients(pretraining(gan_weight=5.0, gan_gradient=True)), without)


def test_the_gan_loss_is_reported_and_absent_without_a_discriminator() -> None:
    assert pretraining().step(0).keys() == {"l1", "discriminator", "gan"}
    assert pretraining(gan_weight=0).step(0).keys() == {"l1"}


def test_the_learning_rate_falls_on_half_a_cosine_to_its_last_share() -> None:
    task = pretraining(lr=0.01, final_lr_ratio=0.2, gan_weight=0)
    rates = []
    for step in range(task.steps):
        task.step(step)
        rates.append(task.optimizer.param_groups[0]["lr"])
    expected = [0.01 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 6)) / 2) for step in range(6)]
    assert rates == pytest.approx(expected)
    constant = pretraining(lr=0.01, gan_weight=0)
    constant.step(5)
    assert constant.optimizer.param_groups[0]["lr"] == 0.01


def test_the_average_follows_by_its_decay_and_is_the_last_weights_without_one() -> None:
    for decay in (0.0, 0.75):
        task = pretraining(average_decay=decay, gan_weight=0)
        weights = []
        for step in range(2):
            task.step(step)
            weights.append(next(task.purifier.inpainter.parameters()).detach().clone())
        average = next(task.average.module.parameters()).detach()
        torch.testing.assert_close(average, decay * weights[0] + (1 - decay) * weights[1])


def test_a_purifier_that_is_stopped_ends_like_one_that_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"epochs": 1.5, "final_lr_ratio": 0.1}
    assert_resumes_exactly(lambda: pretraining(**changes), pretraining_recipe(**changes), tmp_path, monkeypatch)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_every_loss_is_finite_in_either_precision(precision: str) -> None:
    task = finetuning(precision=precision)
    for step in range(3):
        assert all(math.isfinite(value) for value in task.step(step).values())


# Fine-tuning


@pytest.mark.parametrize(("fraction", "attacked"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_exactly_the_stated_share_of_a_batch_is_attacked(fraction: float, attacked: int) -> None:
    task = finetuning(attacked_fraction=fraction, attack_eps=0.05)
    images, labels = task.batches.at(0)

    changes = (task.attack(images, labels, 0) - images).abs().flatten(1).amax(1)

    assert (changes > 0).sum() == attacked
    torch.testing.assert_close(changes[changes > 0], torch.full((attacked,), 0.05))


def test_from_noise_the_attack_leaves_the_ball_and_raises_the_loss_beyond_the_noise() -> None:
    classifier = frozen(smooth_classifier(), CPU)
    task = finetuning(classifier, attacked_fraction=1.0, attack_eps=0.05, attack_noise=2.0)
    images, labels = task.batches.at(0)

    attacked = task.attack(images, labels, 0)

    assert 0.1 < (attacked - images).abs().max() <= 0.15 + 1e-6
    drawn = 2 * torch.rand(images.shape, generator=generator_for(task.recipe.seed, "attack", 0)) - 1
    noisy = (images + 0.1 * drawn).clamp(0, 1)
    assert F.cross_entropy(classifier(attacked), labels) > F.cross_entropy(classifier(noisy), labels)


def test_pretraining_attacks_nothing() -> None:
    task = pretraining()
    images, labels = task.batches.at(0)
    assert torch.equal(task.attack(images, labels, 0), images)


def test_the_attack_raises_the_classifiers_loss() -> None:
    classifier = frozen(smooth_classifier(), CPU)
    task = finetuning(classifier, attacked_fraction=1.0, attack_eps=0.1)
    images, labels = task.batches.at(0)
    attacked = task.attack(images, labels, 0)
    loss = torch.nn.functional.cross_entropy
    assert loss(classifier(attacked), labels) > loss(classifier(images), labels)


def test_end_to_end_the_attack_raises_the_loss_of_the_whole_pipeline() -> None:
    task = finetuning(attack_end_to_end=True, attacked_fraction=1.0)
    alone = finetuning(attacked_fraction=1.0)
    images, labels = task.batches.at(0)
    seeds = task.seeds("attack", 0, len(images))
    assert task.classifier is not None

    def loss(images: Tensor) -> float:
        assert task.classifier is not None
        return F.cross_entropy(task.classifier(task.purifier(images, seeds)), labels).item()

    attacked = task.attack(images, labels, 0)

    assert float((attacked - images).abs().max()) <= 8 / 255 + 1e-6
    assert loss(attacked) > loss(images)
    assert not torch.equal(attacked, alone.attack(images, labels, 0))
    assert all(weight.grad is None for weight in task.purifier.parameters())


def test_the_reconstruction_target_is_the_clean_image_or_the_purifiers_own_input() -> None:
    images, attacked = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert torch.equal(finetuning().target(images, attacked), images)
    assert torch.equal(finetuning(reconstruction_target="clean").target(images, attacked), images)
    assert torch.equal(finetuning(reconstruction_target="input").target(images, attacked), attacked)
    enlarged = finetuning(transform={**TRANSFORM, "working_size": 16}).target(images, attacked)
    assert enlarged.shape == (2, 3, 16, 16)


def test_the_classification_loss_starts_at_its_epoch() -> None:
    def training(weight: float) -> PurifierTraining:
        return finetuning(epochs=2, classification_from_epoch=1, gan_weight=0, classification_weight=weight)

    weighted, unweighted = training(10.0), training(0.0)
    for step in range(5):
        assert weighted.step(step).keys() == unweighted.step(step).keys() == {"l1"}
    assert same(gradients(weighted, 5), gradients(unweighted, 5))
    assert weighted.step(6).keys() == {"l1", "classification", "train_accuracy"}
    assert not same(gradients(weighted, 7), gradients(unweighted, 7))


def test_the_classification_loss_falls_where_it_counts() -> None:
    task = finetuning(epochs=10, classification_weight=20.0, gan_weight=0, lr=5e-3, attacked_fraction=0.0)
    losses = [task.step(step)["classification"] for step in range(task.steps)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_the_classifiers_weights_never_change_and_get_no_gradient() -> None:
    classifier = frozen(smooth_classifier(), CPU)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    task = finetuning(classifier)
    first = next(task.purifier.inpainter.parameters()).detach().clone()
    for step in range(3):
        task.step(step)
    assert_same(dict(classifier.state_dict()), before)
    assert all(weight.grad is None for weight in classifier.parameters())
    assert not classifier.training
    assert not torch.equal(next(task.purifier.inpainter.parameters()), first)


def test_fine_tuning_starts_from_the_weights_it_is_given() -> None:
    initial = pretraining(seed=9).purifier.inpainter.state_dict()
    recipe = FinetuneRecipe.model_validate(RECIPES["finetune-atop"])
    task = PurifierTraining(recipe, color_set(48), CPU, frozen(smooth_classifier(), CPU), initial)
    assert_same(dict(task.purifier.inpainter.state_dict()), dict(initial))
    assert_same(dict(task.average.module.state_dict()), dict(initial))


def test_fine_tuning_refuses_an_in_painter_of_another_shape(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"name": "other", "inpainter": {"architecture": "unet", "width": 8}}
    assert finished.run("finetune-atop", other) == 2
    assert "run purifier trained another in-painter than other asks for" in capsys.readouterr().err
    assert not (finished.runs / "other").exists()


def test_an_autoencoder_learns_goes_on_through_the_classifier_and_is_exported(finished: Workshop) -> None:
    common = {"inpainter": MAE, "reconstruction": "mse", "gan_weight": 0}
    assert finished.run("pretrain-purifier", {**common, "name": "mae", "epochs": 30, "betas": [0.9, 0.95]}) == 0
    fine_tuned = {**common, "name": "mae-atop", "purifier_run": "mae"}
    assert finished.run("finetune-atop", fine_tuned) == 0
    assert finished.run("export", {"name": "autoencoder", "atop_run": "mae-atop"}) == 0

    lines = (finished.runs / "mae" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["mse"] for line in lines]
    bundle = load_bundle(finished.bundle.parents[1] / "autoencoder" / "1")
    images = to_float(color_set(6, seed=2).images, CPU)
    trained = trained_inpainter(finished.runs, "mae-atop", CPU)
    mask = torch.zeros(1, 1, 8, 8)

    spread = 4 * to_float(color_set(48).images, CPU).var().item()  # what one color for all pixels would leave
    assert losses[-1] < spread / 2 < losses[0]
    assert isinstance(bundle.inpainter, MaskedAutoencoder)
    torch.testing.assert_close(bundle.inpainter(images, mask), trained(images, mask), rtol=0, atol=0.01)
    assert bundle.manifest.defenses.atop is not None
    assert bundle.manifest.defenses.atop.inpainter.model_dump() == MAE
    for defense in ("atop", "atop:rt3"):
        probabilities = bundle.probabilities(defense, images, seed=3)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
        assert not torch.allclose(probabilities, bundle.probabilities("none", images), atol=1e-4)
