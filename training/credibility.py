"""Reasons not to believe a robust accuracy: what a defense does when its gradient is no help.

After Athalye et al. (2018), Carlini et al. (2019) and Tramer et al. (2020): a defense that only hides its gradient
looks robust to every attack that follows it. Each check returns one sentence per failure, none where all is well.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from models.defense import DefendedClassifier
from models.randomness import generator_for
from training.attacks.gradients import through
from training.attacks.looks import Looks, seen
from training.attacks.pgd import Model, ascend, cross_entropy
from training.attacks.threats import Linf

NOT_ADAPTIVE = "no attack that knows the defense was run"
ZERO_SHARE = 0.01
"""Of input gradients that may be exactly zero, among the values that no clip to [0, 1] comes near."""
FREE = (0.1, 0.9)
RISING_SHARE = 0.95
"""Of images whose loss must rise along their gradient."""
SMALL_STEP = 1e-3
LARGE_EPS_ACCURACY = 0.1
"""An unbounded attack may leave at most this share right, or the share of the likeliest guess if that is more."""
FAR = 2.0
"""How far in all the steps of that attack may go, in the range of a value."""
DRAWS = 8
"""Looks that a gradient is averaged over: what AToP hides in every one of them has no gradient."""
REPEATED = 4
"""Images that are asked about again: whatever differs from time to time does so for any of them."""
SURE = 0.01
"""A check fails only where chance would do so less often."""
FEWEST = 7
"""Images that it takes for a sign test to fail at all."""


def gradient_health(
    defended: DefendedClassifier, images: Tensor, labels: Tensor, *, classes: int, seed: int, far_steps: int
) -> list[str]:
    """Look at the gradient itself, on a few images (N, 3, H, W) that the defense labels right.

    An attack without bounds has `far_steps` to leave nothing of them.
    """
    if len(images) < FEWEST:
        return [f"of the clean images {len(images)} are labeled right: too few to tell whether its gradient is sound"]
    found = repeatability(defended, images[:REPEATED], seed)
    _, slope = through(defended, labels, Looks(seed, range(len(images))), draws=DRAWS)(images)
    free = (images > FREE[0]) & (images < FREE[1])
    zeros = float((slope[free] == 0).float().mean()) if free.any() else 0.0
    if not bool(slope.isfinite().all()):
        return [*found, "the gradient is not finite"]
    if zeros > ZERO_SHARE:
        found.append(f"{zeros:.0%} of the input gradients are exactly zero")
    else:
        found += stuck_logits(defended, images, labels, seed)
    rising = share_rising(defended, images, labels, slope, seed)
    count = len(images)
    if binomtest(round(rising * count), count, RISING_SHARE, alternative="less").pvalue < SURE:
        found.append(f"the loss rises along the gradient for {rising:.0%} of the images only")
    moved = unbounded(defended, images, labels, seed, steps=far_steps)
    if not bool(through(defended, labels, Looks(seed, range(count)), draws=1)(moved)[1].isfinite().all()):
        found.append("the gradient is not finite where an attack arrives")
    with torch.no_grad():
        verdict = Looks(seed + 1, range(count)).next()
        left = int((defended.answer(moved, verdict).argmax(1) == labels).sum())
    chance = max(LARGE_EPS_ACCURACY, 1 / classes)
    if binomtest(left, count, chance, alternative="greater").pvalue < SURE:
        found.append(f"an attack without bounds leaves {left / count:.0%} right: it does not reach the defense")
    return found


def passes(steps: int, far_steps: int, *, is_random: bool) -> tuple[int, int]:
    """Gradients and answers that `gradient_health` and `more_steps_help` take of every image, if all is well."""
    draws = DRAWS if is_random else 1
    slope_and_rise, stuck, repeated = (draws, 2 * draws), (1, 0), (2, 3)
    far, near = (far_steps + 1, 1), (max(1, steps // 4) + steps, 2 * draws)
    gradients, answers = zip(slope_and_rise, stuck, repeated, far, near, strict=True)
    return sum(gradients), sum(answers)


def repeatability(defended: DefendedClassifier, images: Tensor, seed: int) -> list[str]:
    """The same seeds must give the same logits, watched or not; different seeds different ones, watched or not."""
    one, other = Looks(seed, range(len(images))).next(), Looks(seed + 1, range(len(images))).next()
    with torch.no_grad():
        judged, again, judged_other = (defended.answer(images, seeds) for seeds in (one, one, other))
    with torch.enable_grad():
        watched = images.detach().requires_grad_()
        attacked, attacked_other = (defended.answer(watched, seeds).detach() for seeds in (one, other))
    tolerance = 1e-3 * max(1.0, float(judged.abs().max()))
    found = list[str]()
    if not torch.allclose(judged, again, atol=tolerance):
        found.append("the same seed gives different answers: it has randomness that no seed fixes")
    elif not torch.allclose(judged, attacked, atol=tolerance):
        found.append("it answers differently while it is attacked and while it is judged")
    varies = [not torch.allclose(a, b, atol=1e-6) for a, b in ((judged, judged_other), (attacked, attacked_other))]
    if varies[0] != varies[1]:
        found.append("it is random while it is judged and not while it is attacked, or the other way round")
    return found


def stuck_logits(defended: DefendedClassifier, images: Tensor, labels: Tensor, seed: int) -> list[str]:
    """The logits that decide must move with the image: clipped or rounded ones do not.

    The loss may hide it, because it has a gradient as long as any logit does. A class whose logit is the same for every
    image is no sign of it. It is asked for one vote, since the mean of several has no logits of its own.
    """
    defended = copy.copy(defended)  # itself, for it may do something to its logits behind the classifier
    defended.votes = 1
    found = list[str]()
    with torch.enable_grad():
        watched = images.detach().requires_grad_()
        logits = defended.answer(watched, Looks(seed, range(len(images))).next())
    varies = logits.amax(0) > logits.amin(0)
    wrong = logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
    for whose, classes in (("own", labels), ("likeliest wrong", wrong)):
        logit = logits.gather(1, classes[:, None])
        (slope,) = torch.autograd.grad(logit.sum(), watched, retain_graph=True)
        stuck = float(((slope == 0).flatten(1).all(1) & varies[classes]).float().mean())
        if stuck > ZERO_SHARE:
            found.append(f"the logit of the {whose} class has no gradient for {stuck:.0%} of the images")
    return found


def share_rising(defended: DefendedClassifier, images: Tensor, labels: Tensor, slope: Tensor, seed: int) -> float:
    """The share of images whose loss is larger a small step up its gradient; the same looks before and after."""
    looks = Looks(seed, range(len(images)))
    differences = []
    moved = images + SMALL_STEP * slope / slope.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    with torch.no_grad():
        for _ in range(DRAWS if defended.is_random else 1):
            model = seen(defended, looks.next())
            differences.append(exact_loss(model, moved, labels) - exact_loss(model, images, labels))
    return float((torch.stack(differences).mean(0) > 0).float().mean())


def unbounded(defended: DefendedClassifier, images: Tensor, labels: Tensor, seed: int, *, steps: int) -> Tensor:
    """PGD with eps = 1, which may make any image of any."""
    objective = through(defended, labels, Looks(seed, range(len(images))), draws=1)
    return ascend(objective, images, images, Linf(1.0), steps=steps, step_size=FAR / steps)


def exact_loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in double precision, (N,): in single precision that of a confident answer is zero."""
    return F.cross_entropy(model(images).double(), labels, reduction="none")


def withstands_noise(
    defended: DefendedClassifier, images: Tensor, labels: Tensor, *, eps: float, seed: int, first: int
) -> Tensor:
    """Which images are labeled right when every value moves by plus or minus eps at random, (N,).

    `first` is the number of the first image.
    """
    signs = torch.randint(0, 2, images.shape, generator=generator_for(seed, "signs", first)).to(images.device)
    noisy = (images + eps * (2 * signs - 1)).clamp(0, 1)
    with torch.no_grad():
        verdict = Looks(seed, range(first, first + len(images))).next()
        return (defended.answer(noisy, verdict).argmax(1) == labels).cpu()


def order_of_attacks(
    right: Mapping[str, Tensor], levels: Mapping[str, str], *, clean: Tensor, noise: Tensor
) -> list[str]:
    """Stronger attackers must not do worse. All masks say which of the same images withstood, (N,).

    Compared is with the strongest single attack that knows the defense, image by image: a sign test over those that
    withstood one and not the other. All such attacks together would be no match where the defense draws: each has draws
    of its own, and by chance alone few images withstand many.
    """
    white_box = [mask for name, mask in right.items() if levels[name] in ("L2", "L3", "L4")]
    if not white_box:
        return [NOT_ADAPTIVE]
    best, found = min(white_box, key=lambda mask: int(mask.sum())), list[str]()
    left = _share(best)
    for name, mask in right.items():
        if levels[name] in ("L1", "L5") and surely_fewer(mask, best):
            found.append(
                f"{name}, which does not know the defense, leaves {_share(mask)} right, the best that does {left}"
            )
    if surely_fewer(noise, best):
        found.append(f"random noise leaves {_share(noise)} right, the best attack that knows the defense {left}")
    if surely_fewer(clean, best):
        found.append(f"attacked images do better ({left}) than clean ones ({_share(clean)})")
    return found


def more_steps_leave_more(points: Sequence[tuple[int, Tensor]]) -> list[str]:
    """The curve of accuracy against steps must not rise: `points` are steps and which images withstood them, (N,)."""
    ordered = sorted(points, key=lambda point: point[0])
    return [
        f"{many} steps leave {_share(more)} right, {few} steps {_share(fewer)}"
        for (few, fewer), (many, more) in itertools.pairwise(ordered)
        if surely_fewer(fewer, more)
    ]


def surely_fewer(one: Tensor, other: Tensor) -> bool:
    """Whether fewer images withstood `one` than `other`, beyond chance."""
    fewer, more = int((other & ~one).sum()), int((one & ~other).sum())
    return fewer > more and bool(binomtest(fewer, fewer + more, 0.5, alternative="greater").pvalue < SURE)


def _share(mask: Tensor) -> str:
    return f"{float(mask.float().mean()):.0%}"


def more_steps_help(
    defended: DefendedClassifier, images: Tensor, labels: Tensor, *, eps: float, seed: int, steps: int
) -> list[str]:
    """The loss that the full-gradient attack reaches must not fall when it may take four times as many steps.

    Of fewer images than `FEWEST` nothing is said.
    """
    if len(images) < FEWEST:
        return []

    def loss(steps: int) -> Tensor:
        objective = through(defended, labels, Looks(seed, range(len(images))), draws=1)
        moved = ascend(objective, images, images, Linf(eps), steps=steps, step_size=2 * eps / steps)
        with torch.no_grad():
            looks = Looks(seed + 1, range(len(images)))
            draws = DRAWS if defended.is_random else 1
            seen_losses = [cross_entropy(seen(defended, looks.next())(moved), labels) for _ in range(draws)]
        return torch.stack(seen_losses).mean(0)

    few, many = loss(max(1, steps // 4)), loss(steps)
    worse = int((many < few).sum())
    if binomtest(worse, len(images), 0.5, alternative="greater").pvalue < SURE:
        return [f"with four times the steps the attack reaches a lower loss on {worse} of {len(images)} images"]
    return []
