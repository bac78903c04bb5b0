"""The defended classifier: the one place where a chain of purifiers, votes and seeds come together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.classifiers import Classifier
from models.randomness import derive_seed, fresh_seeds

Seed = int | Sequence[int] | None


class Purifier(Protocol):
    """Images in, images out: same shape, in [0, 1]; one seed per image draws whatever is drawn."""

    @property
    def is_random(self) -> bool: ...

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor: ...


class DefendedClassifier(nn.Module):
    """images -> chain of purifiers -> classifier -> logits, differentiable where the purifiers are.

    `seed` makes the randomness reproducible: one number for every image of a batch, or one per image; None draws
    fresh seeds at every call. With `votes` > 1 the probabilities of that many draws are averaged and their
    logarithm is returned; a chain that draws nothing runs once whatever the number.
    """

    def __init__(self, classifier: Classifier, chain: Sequence[Purifier], *, votes: int = 1, seed: Seed = None) -> None:
        """Raises ValueError unless votes is 1 or more."""
        super().__init__()
        if votes < 1:
            raise ValueError(f"votes is 1 or more, not {votes}")
        self.classifier = classifier
        self.chain = nn.ModuleList(chain)  # type: ignore[arg-type]
        self.votes = votes if self.is_random else 1
        self.seed = seed

    @property
    def is_random(self) -> bool:
        """Whether two calls without a seed can differ."""
        return any(purifier.is_random for purifier in self.chain)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.answer(images, self.seeds_for(images))

    def answer(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Logits (N, K), all votes together; one seed per image fixes every draw.

        Whoever wants the gradient needs the memory of one vote: the others are computed again on the way back.
        """
        watched = self.votes > 1 and images.requires_grad and torch.is_grad_enabled()
        vote = partial(checkpoint, self.vote, use_reentrant=False) if watched else self.vote
        return together([vote(images, seeds, number) for number in range(self.votes)])

    def vote(self, images: Tensor, seeds: Sequence[int], vote: int) -> Tensor:
        """The logits of one draw of the defense's randomness."""
        logits: Tensor = self.classifier(self.purify(images, seeds, vote))
        return logits

    def purify(self, images: Tensor, seeds: Sequence[int], vote: int = 0) -> Tensor:
        """The chain applied left to right; every purifier and every vote has draws of its own."""
        for position, purifier in enumerate(self.chain):
            images = purifier(images, self.step_seeds(seeds, vote, position))
        return images

    @staticmethod
    def step_seeds(seeds: Sequence[int], vote: int, position: int) -> list[int]:
        """The seeds of one purifier of the chain in one vote."""
        return [derive_seed(seed, "vote", vote, "step", position) for seed in seeds]

    def seeds_for(self, images: Tensor) -> list[int]:
        """One seed per image; raises ValueError if the seeds given do not fit the batch."""
        if self.seed is None:
            return fresh_seeds(len(images))
        if isinstance(self.seed, int):
            return [self.seed] * len(images)
        if len(self.seed) != len(images):
            raise ValueError(f"{len(self.seed)} seeds were given for {len(images)} images")
        return list(self.seed)


def together(votes: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probabilities of several votes' logits, (N, K); a single vote stays as it is."""
    if len(votes) == 1:
        return votes[0]
    return torch.stack([vote.log_softmax(1) for vote in votes]).logsumexp(0) - math.log(len(votes))
