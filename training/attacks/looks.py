"""Looks at a defended classifier: each one is a draw of all its randomness, every vote's, and none is the verdict's.

An image's draws belong to the image: they are the same alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.defense import DefendedClassifier
from models.randomness import derive_seed
from training.attacks.pgd import Model


class Looks:
    """Seeds for one look after the other. `ids` tell the images of a batch apart."""

    def __init__(self, seed: int, ids: Sequence[int]) -> None:
        self.seed, self.ids = seed, list(ids)
        self.made = 0

    def next(self) -> list[int]:
        """Seeds that were not given before, one for each image."""
        self.made += 1
        return [derive_seed(self.seed, "look", self.made, image) for image in self.ids]


class SameLook(Looks):
    """Always the same seeds: for an attacker who knows the randomness, or a defense that a client gave a seed."""

    def next(self) -> list[int]:
        """The seeds of the first look."""
        self.made = 0
        return super().next()


def seen(defended: DefendedClassifier, seeds: Sequence[int]) -> Model:
    """One look: images to logits (N, K), differentiable."""
    return lambda images: defended.answer(images, seeds)


class Oracle(torch.nn.Module):
    """A defended classifier that can be asked for logits, for attacks that choose themselves which images they ask of.

    Every call makes `looks` new looks and answers with the mean of their probabilities; images are told apart by their
    place in the call.
    """

    def __init__(self, defended: DefendedClassifier, seed: int, looks: int = 1) -> None:
        super().__init__()
        self.defended, self.seed, self.looks = defended, seed, looks
        self.queries = 0
        """Images that were asked for."""
        self._calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K); with several looks the logarithm of the mean probabilities."""
        self._calls += 1
        self.queries += len(images)
        looks = Looks(derive_seed(self.seed, "call", self._calls), range(len(images)))
        answers = [self.defended.answer(images, looks.next()) for _ in range(self.looks)]
        return answers[0] if len(answers) == 1 else torch.stack(answers).softmax(2).mean(0).log()
