"""`train-aid`: the discriminator against a frozen classifier, by AVmixup (AID, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.aid import Aid, AidDiscriminator, pooled_taps, tap_channels
from models.classifiers import Classifier
from models.randomness import generator_for
from training.adversarial import vertex_mixture
from training.attacks.pgd import pgd_linf
from training.config import AidRecipe, refuse_unknown_layers
from training.data import Batches, ImageSet, in_batches, load_split
from training.parallel import group
from training.precision import autocast
from training.runs import Run, Stateful, fit
from training.trained import refuse_other_data, trained_classifier

# A quantile at 5 % of 10,000 scores has a standard error of 0.2 points.
CALIBRATION_IMAGES = 10_000
CALIBRATED_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def threshold_name(rate: float) -> str:
    """What the run's summary calls the threshold at a false-positive rate."""
    return f"threshold_at_{rate:g}"


class AidTraining:
    """A discriminator and its optimizer; the classifier is frozen and in eval mode throughout."""

    def __init__(self, recipe: AidRecipe, data: ImageSet, classifier: Classifier, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.classifier, self.device = recipe, classifier, device
        self.batches = Batches(data, recipe.batch_size, recipe.augmentation, recipe.seed, device)
        self.steps = self.batches.steps_in(recipe.epochs)
        channels = tap_channels(classifier, recipe.discriminator.taps, data.images.shape[-2:])
        self.discriminator = AidDiscriminator(recipe.discriminator, channels).to(device)
        self.optimizer = torch.optim.SGD(
            self.discriminator.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def state(self) -> Mapping[str, Stateful]:
        return {"discriminator": self.discriminator, "optimizer": self.optimizer}

    def step(self, step: int) -> dict[str, float]:
        images, labels = self.batches.at(step)
        generator = generator_for(self.recipe.seed, "aid", step, *group().path)
        with autocast(self.device, self.recipe.precision):
            adversarial = self.attack(images, labels, generator)
            mixed, naturalness = vertex_mixture(images, adversarial, gamma=self.recipe.gamma, generator=generator)
            with torch.no_grad():
                taps = pooled_taps(self.classifier, mixed, self.recipe.discriminator.taps)
        # The discriminator is small: float32 costs nothing and keeps its batch norms exact.
        logits = self.discriminator.train()([tap.float() for tap in taps])
        loss = F.binary_cross_entropy_with_logits(logits, naturalness)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        error = (logits.sigmoid() - naturalness).abs().mean()
        return {"loss": loss.item(), "score_error": error.item()}

    def attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """PGD on the classifier alone."""
        return pgd_linf(
            self.classifier,
            images,
            labels,
            eps=self.recipe.attack_eps,
            steps=self.recipe.attack_steps,
            step_size=self.recipe.attack_step_size,
            generator=generator,
        )

    def summarize(self) -> dict[str, float]:
        """Thresholds: below each, its share of the clean training images scores.

        `threshold` is that of the recipe's `false_positive_rate`; the others are what `export` offers to `auto`.
        """
        aid = Aid(self.classifier, self.discriminator.eval(), self.recipe.discriminator.taps)
        clean = self.batches.data.subset(torch.arange(min(CALIBRATION_IMAGES, len(self.batches.data))))
        with torch.no_grad():
            scores = torch.cat([aid(images) for images, _ in in_batches(clean, 500, self.device)])
        at = {threshold_name(rate): scores.quantile(rate).item() for rate in CALIBRATED_RATES}
        return {"threshold": scores.quantile(self.recipe.false_positive_rate).item(), **at}


def train_aid(recipe: AidRecipe, runs: Path, device: torch.device) -> dict[str, Any]:
    """Train, or go on training, the discriminator of a recipe.

    Raises RunError if the classifier's run is missing or not finished, RecipeError for a tap it does not have,
    DataError if it was trained for other classes or another size.
    """
    run = Run(runs, recipe)
    classifier = trained_classifier(runs, recipe.classifier_run, device)
    refuse_unknown_layers(classifier, recipe.discriminator.taps)
    data = load_split(recipe.data, recipe.data.train_split)
    refuse_other_data(runs, recipe.classifier_run, data)
    task = AidTraining(recipe, data, classifier, device)
    return fit(run, task, checkpoint_every_s=recipe.checkpoint_every_s, given={"classifier": classifier.state_dict()})
