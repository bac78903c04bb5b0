from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.randomness import normal
from tests.networks import tiny_bundle, tiny_classifier


class Scale(nn.Module):
    """A purifier that draws nothing."""

    is_random = False

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images * self.factor + self.shift


class Jitter(nn.Module):
    """A purifier that draws; counts how often it ran."""

    is_random = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = list[list[int]]()

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        self.seeds.append(list(seeds))
        return images + 0.1 * normal(seeds, images.shape[1:], images.device)


@pytest.fixture
def classifier() -> Classifier:
    return tiny_classifier()


IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_an_empty_chain_is_the_classifier(classifier: Classifier) -> None:
    assert torch.equal(DefendedClassifier(classifier, [])(IMAGES), classifier(IMAGES))


def test_a_chain_runs_from_left_to_right(classifier: Classifier) -> None:
    defended = DefendedClassifier(classifier, [Scale(0.5, 0.0), Scale(1.0, 0.25)])

    assert torch.equal(defended(IMAGES), classifier(IMAGES * 0.5 + 0.25))


def test_votes_average_probabilities(classifier: Classifier) -> None:
    defended = DefendedClassifier(classifier, [Jitter()], votes=3, seed=7)

    logits = defended(IMAGES)

    each = torch.stack([defended.vote(IMAGES, [7] * 5, vote).softmax(1) for vote in range(3)])
    assert torch.allclose(logits.softmax(1), each.mean(0), atol=1e-6)
    assert torch.allclose(logits.exp().sum(1), torch.ones(5), atol=1e-5)
    assert not torch.allclose(each[0], each[1])


def test_a_chain_that_draws_nothing_runs_once_whatever_the_votes(classifier: Classifier) -> None:
    assert DefendedClassifier(classifier, [Scale(1, 0)], votes=64).votes == 1


def test_every_vote_and_every_step_has_draws_of_its_own(classifier: Classifier) -> None:
    first, second = Jitter(), Jitter()

    DefendedClassifier(classifier, [first, second], votes=2, seed=1)(IMAGES)

    used = [tuple(seeds) for jitter in (first, second) for seeds in jitter.seeds]
    assert len(set(used)) == len(used) == 4


def test_a_seed_repeats_and_none_is_fresh_every_time(classifier: Classifier) -> None:
    seeded = DefendedClassifier(classifier, [Jitter()], seed=3)
    unseeded = DefendedClassifier(classifier, [Jitter()])

    assert torch.equal(seeded(IMAGES), seeded(IMAGES))
    assert not torch.equal(unseeded(IMAGES), unseeded(IMAGES))


def test_one_seed_per_image_is_that_image_s_alone(classifier: Classifier) -> None:
    together = DefendedClassifier(classifier, [Jitter()], seed=[1, 2, 3, 4, 5])(IMAGES)
    alone = DefendedClassifier(classifier, [Jitter()], seed=3)(IMAGES[2:3])

    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_impossible_votes_and_seeds_are_refused(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="votes is 1 or more"):
        DefendedClassifier(classifier, [], votes=0)
    with pytest.raises(ValueError, match="2 seeds were given for 5 images"):
        DefendedClassifier(classifier, [Jitter()], seed=[1, 2])(IMAGES)


@pytest.mark.parametrize("defense", ["atop", "atop:rt1", "atop:rt3", "aid", "zeropur", "zeropur:coarse", "atop,aid"])
def test_every_defense_is_differentiable_and_independent_of_neighbors(defense: str) -> None:
    bundle = tiny_bundle()
    images = IMAGES.clone().requires_grad_()

    logits = bundle.defended(defense, seed=[11, 12, 13, 14, 15])(images)
    logits[2].logsumexp(0).backward()

    alone = bundle.defended(defense, seed=13)(IMAGES[2:3])
    assert torch.allclose(logits[2:3].detach(), alone.detach(), atol=1e-4)
    assert images.grad is not None
    assert float(images.grad[2].abs().sum()) > 0
    assert float(images.grad[[0, 1, 3, 4]].abs().sum()) == 0
