"""`train-classifier`: the undefended classifier, by plain supervised or by adversarial training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.classifiers import Classifier, build_classifier
from models.randomness import generator_for
from models.speednet import WhiteningStem
from training.adversarial import attack, running_statistics_kept, training_loss
from training.config import ClassifierRecipe
from training.data import Batches, ImageSet, in_batches, load_split, to_float
from training.parallel import group
from training.precision import autocast
from training.runs import Run, RunError, Stateful, fit, read_recipe_of
from training.trained import on_device, refuse_other_data, trained_classifier

# 961 patches each: enough for the covariance of twelve numbers.
WHITENING_IMAGES = 5000


class ClassifierTraining:
    """A classifier, its optimizer and the average of its weights."""

    def __init__(
        self,
        recipe: ClassifierRecipe,
        data: ImageSet,
        test: ImageSet,
        device: torch.device,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial` are weights to start from."""
        torch.manual_seed(recipe.seed)
        self.recipe, self.test, self.device = recipe, test, device
        self.batches = Batches(data, recipe.batch_size, recipe.augmentation, recipe.seed, device)
        self.steps = self.batches.steps_in(recipe.epochs)
        self.classifier = on_device(initial_classifier(recipe, data), device)
        if initial is not None:
            self.classifier.load_state_dict(initial)
        self.optimizer = torch.optim.SGD(
            [p for p in self.classifier.parameters() if p.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
        warmup = recipe.warmup_epochs * self.batches.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_then_cosine(step, warmup, self.steps)
        )
        self.average = AveragedModel(
            self.classifier, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay), use_buffers=True
        )

    def state(self) -> Mapping[str, Stateful]:
        return {
            "classifier": self.classifier,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def step(self, step: int) -> dict[str, float]:
        self.classifier.train()
        images, labels = self.batches.at(step)
        images, targets = self.mix(images, F.one_hot(labels, len(self.batches.data.classes)).float(), step)
        attacked, targets = self.attack(images, targets, step)
        loss, logits = training_loss(self.logits, images, attacked, targets, self.recipe.adversarial, self.loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.classifier)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": loss.item(), "train_accuracy": accuracy.item()}

    def logits(self, images: Tensor) -> Tensor:
        """Of the classifier in whatever mode it is in, at the recipe's precision; float32 (N, K)."""
        with autocast(self.device, self.recipe.precision):
            logits: Tensor = self.classifier(images)
        return logits.float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy with the recipe's label smoothing."""
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)

    def attack(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The images that this step trains on, adversarial if the recipe says so, and their targets."""
        if self.recipe.adversarial is None:
            return images, targets
        generator = generator_for(self.recipe.seed, "attack", step, *group().path)
        with running_statistics_kept(self.classifier):
            return attack(self.logits, images, targets, self.recipe.adversarial, generator)

    def mix(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """CutMix on the recipe's share of the batches."""
        generator = generator_for(self.recipe.seed, "cutmix", step, *group().path)
        if torch.rand((), generator=generator) >= self.recipe.cutmix:
            return images, targets
        return cutmix(images, targets, generator)

    def summarize(self) -> dict[str, float]:
        return {"test_accuracy": accuracy_on(self.average.module, self.test, self.device)}


def initial_classifier(recipe: ClassifierRecipe, data: ImageSet) -> Classifier:
    """A fresh classifier; it normalizes by the training images' mean and deviation, a whitening stem is set by them."""
    pixels = to_float(data.images, torch.device("cpu"))
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    classifier = build_classifier(
        recipe.architecture,
        num_classes=len(data.classes),
        input_size=recipe.data.input_size,
        mean=mean.tolist(),
        std=std.tolist(),
        mirrored=recipe.mirrored,
    )
    for module in classifier.modules():
        if isinstance(module, WhiteningStem):
            module.set_whitening(classifier.normalize(pixels[:WHITENING_IMAGES]))
    return classifier


def warmup_then_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor of the learning rate: linear up to 1 over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def cutmix(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace one box of every image by that of another of the batch, and mix the targets (N, K) by area."""
    height, width = images.shape[-2:]
    kept, center_y, center_x = torch.rand(3, generator=generator).tolist()
    half = 0.5 * math.sqrt(1 - kept)  # half the box's side, as a share of the image's
    top, bottom = (round(height * min(1, max(0, center_y + side))) for side in (-half, half))
    left, right = (round(width * min(1, max(0, center_x + side))) for side in (-half, half))
    other = torch.randperm(len(images), generator=generator).to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets, targets[other], share)


@torch.no_grad()
def accuracy_on(classifier: torch.nn.Module, data: ImageSet, device: torch.device) -> float:
    """Share of `data` that the classifier, in eval mode and float32, labels right."""
    classifier.eval()
    right = sum(int((classifier(images).argmax(1) == labels).sum()) for images, labels in in_batches(data, 500, device))
    return right / len(data)


def train_classifier(recipe: ClassifierRecipe, runs: Path, device: torch.device) -> dict[str, Any]:
    """Train, or go on training, the classifier of a recipe; returns the summary with its test accuracy.

    Raises RunError if the run that it starts from is missing, not finished or of another architecture, DataError if
    that one was trained for other classes or another size.
    """
    run = Run(runs, recipe)
    data, test = load_split(recipe.data, recipe.data.train_split), load_split(recipe.data, recipe.data.test_split)
    given = dict[str, Mapping[str, Tensor]]()
    if recipe.initial_run is not None:
        if (architecture := read_recipe_of(runs, recipe.initial_run)["architecture"]) != recipe.architecture:
            raise RunError(
                f"run {recipe.initial_run} trained a {architecture}, not the {recipe.architecture} asked for"
            )
        refuse_other_data(runs, recipe.initial_run, data)
        given["initial"] = trained_classifier(runs, recipe.initial_run, device).state_dict()
    task = ClassifierTraining(recipe, data, test, device, given.get("initial"))
    return fit(run, task, checkpoint_every_s=recipe.checkpoint_every_s, given=given)
