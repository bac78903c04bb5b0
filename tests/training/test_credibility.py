"""Healthy defenses have nothing said against them; broken ones are found out, each by what is broken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.classifiers import Classifier
from models.defense import DefendedClassifier
from models.randomness import normal
from tests.fakes import smooth_classifier
from tests.networks import SIZE, sensitive, tiny_bundle, tiny_classifier
from training.credibility import (
    exact_loss,
    gradient_health,
    more_steps_help,
    more_steps_leave_more,
    order_of_attacks,
    passes,
    surely_fewer,
    withstands_noise,
)

IMAGES = 0.3 + 0.4 * torch.rand(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def classifier_of() -> Classifier:
    return sensitive(tiny_classifier(), IMAGES)


def labels_of(defended: DefendedClassifier) -> Tensor:
    """What the defense says, so that it is right on every image."""
    with torch.no_grad():
        return defended.vote(IMAGES, range(12), 0).argmax(1)


def said_of(defended: DefendedClassifier) -> str:
    labels = labels_of(defended)
    found = gradient_health(defended, IMAGES, labels, classes=4, seed=0, far_steps=10)
    found += more_steps_help(defended, IMAGES, labels, eps=0.05, seed=0, steps=8)
    return "; ".join(found)


class Purifier(nn.Module):
    is_random = False

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        raise NotImplementedError


class Rounding(Purifier):
    """Its gradient is zero everywhere."""

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return (images * 7).round() / 7


class HalfDetached(Purifier):
    """A third of the gradient is missing."""

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return torch.cat([images[:, :1].detach(), images[:, 1:]], dim=1)


class Detached(Purifier):
    """No gradient comes back at all."""

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images.detach()


class Overflowing(Purifier):
    """Sound at clean images; an attack arrives where the gradient is infinite."""

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images + 1e-3 * (1 - images).sqrt()


class RandomWhenJudged(Purifier):
    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            return images
        return images + 0.1 * normal(seeds, images.shape[1:], images.device)


class Unseeded(Purifier):
    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images + 0.1 * torch.randn_like(images)


class WrongWay(torch.autograd.Function):
    """Forward the identity, backward its negative."""

    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return -gradient


class Misleading(Purifier):
    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        moved: Tensor = WrongWay.apply(images)  # type: ignore[no-untyped-call]
        return moved


class Clipped(nn.Module):
    """Logits that leave no [-limit, limit], multiplied before."""

    def __init__(self, limit: float, factor: float) -> None:
        super().__init__()
        self.limit, self.factor = limit, factor

    def forward(self, logits: Tensor) -> Tensor:
        return (self.factor * logits).clamp(-self.limit, self.limit)


def clipped(limit: float, factor: float = 1.0) -> DefendedClassifier:
    stages = dict(smooth_classifier(4).stages.items())
    stages["head"] = nn.Sequential(stages["head"], Clipped(limit, factor))
    return DefendedClassifier(Classifier(stages).eval().requires_grad_(False), [])


@pytest.mark.parametrize("defense", ["none", "atop:rt1", "atop:rt2", "atop:rt3", "aid", "zeropur", "atop,aid"])
def test_nothing_is_said_against_the_gradients_of_our_defenses(defense: str) -> None:
    bundle = tiny_bundle()
    sensitive(bundle.classifier, IMAGES)
    assert said_of(bundle.defended(defense)) == ""


def test_nothing_is_said_against_the_mean_of_several_votes() -> None:
    bundle = tiny_bundle()
    sensitive(bundle.classifier, IMAGES)
    assert said_of(bundle.defended("atop:rt2", votes=3)) == ""


@pytest.mark.parametrize("defense", ["atop:rt1", "aid"])
@pytest.mark.parametrize(("steps", "far_steps"), [(2, 5), (8, 10)])
def test_the_passes_that_a_forecast_counts_are_those_that_are_made(
    defense: str, steps: int, far_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, made = tiny_bundle(), {True: 0, False: 0}
    sensitive(bundle.classifier, IMAGES)
    defended, vote = bundle.defended(defense), DefendedClassifier.vote
    labels = labels_of(defended)

    def counted(self: DefendedClassifier, images: Tensor, seeds: Sequence[int], number: int) -> Tensor:
        made[torch.is_grad_enabled()] += 1
        return vote(self, images, seeds, number)

    monkeypatch.setattr(DefendedClassifier, "vote", counted)
    assert gradient_health(defended, IMAGES, labels, classes=4, seed=0, far_steps=far_steps) == []
    assert more_steps_help(defended, IMAGES, labels, eps=0.05, seed=0, steps=steps) == []
    assert (made[True], made[False]) == passes(steps, far_steps, is_random=defended.is_random)


@pytest.mark.parametrize(
    ("purifier", "reason"),
    [
        (Rounding(), "100% of the input gradients are exactly zero"),
        (Detached(), "100% of the input gradients are exactly zero"),
        (Overflowing(), "the gradient is not finite where an attack arrives"),
        (HalfDetached(), "33% of the input gradients are exactly zero"),
        (RandomWhenJudged(), "it is random while it is judged and not while it is attacked"),
        (RandomWhenJudged(), "it answers differently while it is attacked and while it is judged"),
        (Unseeded(), "it has randomness that no seed fixes"),
        (Misleading(), "the loss rises along the gradient for 0% of the images only"),
    ],
)
def test_a_broken_defense_is_found_out(purifier: Purifier, reason: str) -> None:
    assert reason in said_of(DefendedClassifier(classifier_of(), [purifier]))


def test_too_few_images_are_no_evidence_of_a_sound_gradient() -> None:
    defended = DefendedClassifier(classifier_of(), [])
    labels = labels_of(defended)
    few = gradient_health(defended, IMAGES[:6], labels[:6], classes=4, seed=0, far_steps=10)
    assert few == ["of the clean images 6 are labeled right: too few to tell whether its gradient is sound"]
    assert more_steps_help(defended, IMAGES[:6], labels[:6], eps=0.05, seed=0, steps=8) == []
    assert gradient_health(defended, IMAGES[:7], labels[:7], classes=4, seed=0, far_steps=10) == []


def test_logits_that_are_all_clipped_leave_no_gradient() -> None:
    assert "input gradients are exactly zero" in said_of(clipped(1.0, factor=1e6))


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_logits_that_are_clipped_at_the_top_are_found_out(quantile: float) -> None:
    """The loss still has a gradient, by way of the other logits: only those that decide tell."""
    largest = smooth_classifier(4)(IMAGES).detach().amax(1)
    limit = float(largest.quantile(quantile))
    said = said_of(clipped(limit))
    reached = float((largest > limit).float().mean())
    assert f"the logit of the own class has no gradient for {reached:.0%} of the images" in said
    assert "input gradients are exactly zero" not in said


class Trembling(nn.Module):
    """A purifier that adds a little noise."""

    is_random = True

    def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return images + 1e-4 * normal(seeds, images.shape[1:], images.device)


def test_a_clip_is_found_out_behind_several_votes() -> None:
    """The mean of probabilities has no clipped logits: its logarithm moves with any of them."""
    limit = float(smooth_classifier(4)(IMAGES).detach().amax(1).median())
    said = said_of(DefendedClassifier(clipped(limit).classifier, [Trembling()], votes=3))
    assert "the logit of the own class has no gradient" in said


class ClippedAnswer(DefendedClassifier):
    """A defense that clips what its classifier says, vote by vote or at the very end."""

    where = "vote"

    def limited(self, logits: Tensor) -> Tensor:
        limit = float(smooth_classifier(4)(IMAGES).detach().amax(1).median())
        return logits.clamp(-limit, limit)

    def vote(self, images: Tensor, seeds: Sequence[int], vote: int) -> Tensor:
        logits = super().vote(images, seeds, vote)
        return self.limited(logits) if self.where == "vote" else logits

    def answer(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        logits = super().answer(images, seeds)
        return self.limited(logits) if self.where == "answer" else logits


@pytest.mark.parametrize("where", ["vote", "answer"])
def test_a_clip_is_found_out_behind_the_classifier(where: str) -> None:
    defended = ClippedAnswer(smooth_classifier(4).requires_grad_(False), [])
    defended.where = where
    assert "the logit of the own class has no gradient for 50% of the images" in said_of(defended)


def test_a_clip_that_no_logit_reaches_is_no_reason_to_doubt() -> None:
    assert "no gradient" not in said_of(clipped(1.0))


def test_an_attack_without_bounds_must_win() -> None:
    assert "an attack without bounds leaves" in said_of(DefendedClassifier(classifier_of(), [Misleading()]))


# What stronger and weaker attackers found


def withstood(count: int, of: int = 100) -> Tensor:
    return torch.arange(of) < count


LEVELS = {"pgd20": "L1", "bpda": "L2", "full": "L3", "square": "L5", "transfer": "L5"}
HEALTHY = {"pgd20": withstood(70), "bpda": withstood(40), "full": withstood(35), "square": withstood(60)}


def said_of_order(right: dict[str, Tensor], clean: int = 90, noise: int = 85) -> list[str]:
    return order_of_attacks(right, LEVELS, clean=withstood(clean), noise=withstood(noise))


def test_the_usual_order_is_no_reason_to_doubt() -> None:
    assert said_of_order(HEALTHY) == []
    assert said_of_order({**HEALTHY, "square": withstood(30)}) == []  # chance explains it


@pytest.mark.parametrize("weaker", ["pgd20", "square", "transfer"])
def test_an_attacker_who_knows_less_must_not_win_more(weaker: str) -> None:
    (reason,) = said_of_order({**HEALTHY, weaker: withstood(10)})
    assert reason == f"{weaker}, which does not know the defense, leaves 10% right, the best that does 35%"


def test_useless_attacks_that_know_the_defense_do_not_hide_that_a_weaker_one_wins() -> None:
    """Each loses a fifth of the images by its own draws alone, so that few withstand all of them."""
    generator = torch.Generator().manual_seed(0)
    right = {name: torch.rand(100, generator=generator) > 0.2 for name in ("bpda", "full")}
    useless = {f"useless{draw}": torch.rand(100, generator=generator) > 0.2 for draw in range(5)}
    levels = LEVELS | dict.fromkeys(useless, "L4")
    assert torch.stack([*right.values(), *useless.values()]).all(0).sum() < 35
    (reason,) = order_of_attacks(
        {**right, **useless, "square": withstood(35)}, levels, clean=withstood(90), noise=withstood(85)
    )
    assert reason.startswith("square, which does not know the defense, leaves 35% right")


def test_noise_and_clean_images_must_not_be_harder_than_attacks() -> None:
    assert "random noise leaves 10% right" in said_of_order(HEALTHY, noise=10)[0]
    assert "attacked images do better (35%) than clean ones (15%)" in said_of_order(HEALTHY, clean=15)[0]


def test_without_an_attack_that_knows_the_defense_there_is_no_evidence() -> None:
    assert said_of_order({"pgd20": withstood(70)}) == ["no attack that knows the defense was run"]


def test_more_steps_must_not_leave_more() -> None:
    curve = [(20, withstood(50)), (1, withstood(80)), (5, withstood(30))]
    assert more_steps_leave_more(curve) == ["20 steps leave 50% right, 5 steps 30%"]
    assert more_steps_leave_more([(1, withstood(80)), (5, withstood(30)), (20, withstood(33))]) == []  # chance
    assert more_steps_leave_more([]) == []


def test_noise_is_as_large_as_the_budget() -> None:
    seen = list[Tensor]()

    class Watching(Purifier):
        def forward(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
            seen.append(images)
            return images

    defended = DefendedClassifier(classifier_of(), [Watching()])
    found = withstands_noise(defended, IMAGES, labels_of(defended), eps=0.1, seed=0, first=0)
    noisy = seen[-1]
    assert torch.equal(found, defended.vote(noisy, range(12), 0).argmax(1) == labels_of(defended))
    torch.testing.assert_close((noisy - IMAGES).abs(), torch.full_like(IMAGES, 0.1))


def test_a_difference_that_chance_explains_is_none() -> None:
    assert surely_fewer(withstood(30), withstood(40))
    assert not surely_fewer(withstood(30), withstood(35))  # five of five: one in 32
    assert not surely_fewer(withstood(40), withstood(30))


def test_the_loss_of_a_confident_answer_can_still_rise() -> None:
    logits = torch.tensor([[30.0, 0.0], [29.9, 0.0]])
    one, other = exact_loss(lambda _: logits, IMAGES[:2], torch.tensor([0, 0])).tolist()
    assert 0 < one < other
