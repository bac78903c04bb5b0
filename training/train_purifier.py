"""`pretrain-purifier` and `finetune-atop`: the two stages of AToP (Lin et al., 2024, §3.2 and Eq. 9).

Pre-training restores clean images from their random transforms. Fine-tuning goes on from there with FGSM
images of the frozen classifier, and adds lambda times the classification loss of what it restores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import transforms
from models.atop import AtopPurifier, build_inpainter
from models.classifiers import Classifier
from models.patchgan import PatchDiscriminator, discriminator_loss, generator_loss
from models.randomness import derive_seed, generator_for
from training.attacks.pgd import noisy_fgsm
from training.config import FinetuneRecipe, PretrainRecipe, PurifierRecipe
from training.data import Batches, ImageSet, load_split
from training.parallel import group
from training.precision import autocast
from training.runs import Run, RunError, Stateful, fit, read_recipe_of
from training.trained import on_device, refuse_other_data, trained_classifier, trained_inpainter


class PurifierTraining:
    """An in-painter, its discriminator and their optimizers; a classifier when fine-tuning."""

    def __init__(
        self,
        recipe: PurifierRecipe,
        data: ImageSet,
        device: torch.device,
        classifier: Classifier | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.classifier = recipe, device, classifier
        self.batches = Batches(data, recipe.batch_size, recipe.augmentation, recipe.seed, device)
        self.steps = self.batches.steps_in(recipe.epochs)
        inpainter = on_device(build_inpainter(recipe.inpainter), device)
        if initial is not None:
            inpainter.load_state_dict(initial)
        self.purifier = AtopPurifier(inpainter, recipe.transform)
        self.average = AveragedModel(inpainter, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay))
        self.optimizer = torch.optim.Adam(inpainter.parameters(), lr=recipe.lr, betas=recipe.betas)
        self.discriminator = PatchDiscriminator(recipe.discriminator_width).to(device)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=recipe.lr, betas=recipe.betas
        )

    def state(self) -> Mapping[str, Stateful]:
        return {
            "inpainter": self.purifier.inpainter,
            "average": self.average,
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def step(self, step: int) -> dict[str, float]:
        images, labels = self.batches.at(step)
        attacked = self.attack(images, labels, step)
        target = self.target(images, attacked)
        mask, hidden = self.transform(attacked, step)
        with autocast(self.device, self.recipe.precision):
            stages = [stage.float() for stage in self.purifier.inpainter(hidden, mask)]
            restored = stages[-1].clamp(0, 1)
            losses = self.classification_losses(restored, images.shape[-2:], labels, step)
        reconstruction = RECONSTRUCTION_LOSSES[self.recipe.reconstruction](stages, target)
        losses |= {self.recipe.reconstruction: reconstruction, **self.adversarial_losses(target, restored, mask)}
        total = reconstruction + self.recipe.gan_weight * losses.get("gan", 0.0)
        if isinstance(self.recipe, FinetuneRecipe):
            total = total + self.recipe.classification_weight * losses.get("classification", 0.0)
        self.update(total, step)
        return {name: loss.item() for name, loss in losses.items()}

    def attack(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The purifier's input: the images, of which fine-tuning attacks a share by FGSM."""
        recipe, classifier = self.recipe, self.classifier
        if not isinstance(recipe, FinetuneRecipe) or classifier is None:
            return images
        count = round(recipe.attacked_fraction * len(images))
        if count == 0:
            return images

        def pipeline(images: Tensor) -> Tensor:
            seeds = self.seeds("attack", step, len(images))
            logits: Tensor = classifier(self.purifier(images, seeds))
            return logits

        victim = pipeline if recipe.attack_end_to_end else classifier
        with autocast(self.device, recipe.precision):
            adversarial = noisy_fgsm(
                victim,
                images[:count],
                labels[:count],
                eps=recipe.attack_eps,
                noise=recipe.attack_noise,
                generator=generator_for(recipe.seed, "attack", step, *group().path),
            )
        return torch.cat([adversarial, images[count:]])

    def seeds(self, purpose: str, step: int, count: int) -> list[int]:
        """One for each image of a step, for the transform that it goes through."""
        first = group().rank * count
        return [derive_seed(self.recipe.seed, purpose, step, first + index) for index in range(count)]

    def target(self, images: Tensor, attacked: Tensor) -> Tensor:
        """What the reconstruction should be, at the working size (see `FinetuneRecipe.reconstruction_target`)."""
        own_input = isinstance(self.recipe, FinetuneRecipe) and self.recipe.reconstruction_target == "input"
        return self.purifier.enlarge(attacked if own_input else images)

    def transform(self, attacked: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """t(x): a mask (N, 1, P, P) and the hidden images; RT3 trains on one of its passes, as RT2 does."""
        seeds = self.seeds("transform", step, len(attacked))
        mask = self.purifier.draw_masks(seeds, self.device)[0]
        noisy = self.purifier.noisy(self.purifier.enlarge(attacked), seeds)
        return mask, transforms.hide(noisy, mask).contiguous(memory_format=torch.channels_last)

    def adversarial_losses(self, target: Tensor, restored: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, then the loss it gives the generator.

        Always float32: under bfloat16 autocast the spectrally normalized weights received NaN gradients.
        """
        if self.recipe.gan_weight == 0:
            return {}
        real = self.discriminator(target, mask)
        fake = self.discriminator(restored.detach(), mask)
        loss = discriminator_loss(real, fake)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        seen = restored if self.recipe.gan_gradient else restored.detach()
        self.discriminator.requires_grad_(False)
        gan = generator_loss(self.discriminator(seen, mask))
        self.discriminator.requires_grad_(True)
        return {"discriminator": loss.detach(), "gan": gan}

    def classification_losses(self, restored: Tensor, size: torch.Size, labels: Tensor, step: int) -> dict[str, Tensor]:
        """CE(f(g(t(x'))), y) through the frozen classifier, and the accuracy that goes with it."""
        recipe = self.recipe
        if not isinstance(recipe, FinetuneRecipe) or self.classifier is None:
            return {}
        if step < recipe.classification_from_epoch * self.batches.steps_per_epoch:
            return {}
        logits = self.classifier(self.purifier.shrink(restored, size)).float()
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"classification": F.cross_entropy(logits, labels), "train_accuracy": accuracy}

    def update(self, total: Tensor, step: int) -> None:
        """One step of Adam down the gradient of `total`, at this step's learning rate."""
        ratio = self.recipe.final_lr_ratio
        factor = ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.recipe.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.average.update_parameters(self.purifier.inpainter)

    def summarize(self) -> dict[str, float]:
        """Nothing: what a purifier is worth shows behind a classifier (`evaluate`)."""
        return {}


def sum_l1(stages: list[Tensor], target: Tensor) -> Tensor:
    """Mean absolute error of every stage's output, added up, on the papers' [-1, 1] scale."""
    return torch.stack([2 * (stage - target).abs().mean() for stage in stages]).sum()


def sum_mse(stages: list[Tensor], target: Tensor) -> Tensor:
    """Mean squared error of every stage's output, added up, on the papers' [-1, 1] scale (AToP's L_mae)."""
    return torch.stack([4 * (stage - target).square().mean() for stage in stages]).sum()


RECONSTRUCTION_LOSSES = {"l1": sum_l1, "mse": sum_mse}


def pretrain_purifier(recipe: PretrainRecipe, runs: Path, device: torch.device) -> dict[str, Any]:
    """Train, or go on training, an in-painter on clean images."""
    run = Run(runs, recipe)
    task = PurifierTraining(recipe, load_split(recipe.data, recipe.data.train_split), device)
    return fit(run, task, checkpoint_every_s=recipe.checkpoint_every_s)


def finetune_atop(recipe: FinetuneRecipe, runs: Path, device: torch.device) -> dict[str, Any]:
    """Fine-tune, or go on fine-tuning, a pre-trained in-painter through a frozen classifier.

    Raises RunError if the classifier's or the pre-training run is missing or not finished, or if the in-painters
    differ; DataError if the classifier was trained for other classes or another size.
    """
    run = Run(runs, recipe)
    pretrained = read_recipe_of(runs, recipe.purifier_run)
    if pretrained["inpainter"] != recipe.inpainter.model_dump():
        raise RunError(f"run {recipe.purifier_run} trained another in-painter than {recipe.name} asks for")
    classifier = trained_classifier(runs, recipe.classifier_run, device)
    initial = trained_inpainter(runs, recipe.purifier_run, device).state_dict()
    data = load_split(recipe.data, recipe.data.train_split)
    refuse_other_data(runs, recipe.classifier_run, data)
    given = {"classifier": classifier.state_dict(), "purifier": initial}
    task = PurifierTraining(recipe, data, device, classifier, initial)
    return fit(run, task, checkpoint_every_s=recipe.checkpoint_every_s, given=given)
