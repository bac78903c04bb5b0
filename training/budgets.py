"""How much work `evaluate` puts into each level: from minutes on two cores to what the literature asks for."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from models.manifest import Strict

GreyBoxName = Annotated[
    str, Field(pattern=r"^(fgsm|pgd[1-9][0-9]{0,3}(_l2)?|pgd_l2|mim|deepfool|cw|cw20|di2|autoattack)$")
]
"""An attack on the classifier alone; `pgd20` and `pgd20_l2` have their number of steps, `pgd_l2` is the latter."""
BudgetName = Literal["quick", "standard", "paper"]


class FurtherAttack(Strict):
    """An attack that a recipe asks for beside its budget's; it stays out of the worst case."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    attack: Literal["pgd", "bpda", "rand", "stadv", "aware_aid"]
    """Full gradient or BPDA with EOT, the two attacks of AutoAttack `rand`, moved pixels, or PGD on the classifier that
    looks natural to AID, without purification, as in AID's Appendix E."""
    norm: Literal["linf", "l2"] | None = None
    eps: PositiveFloat | None = None
    """The ball of `norm`; `stadv` has neither, its bound is on how far pixels move."""
    steps: PositiveInt
    draws: PositiveInt
    """Over which the gradient of a random defense is averaged."""
    images: PositiveInt
    weight: PositiveFloat | None = None
    """Of `aware_aid`, which alone has one: how much looking natural counts beside fooling the classifier."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name in ("standard", "clean"):
            raise ValueError(f"{self.name} is no attack")
        given = {self.norm is not None, self.eps is not None}
        if given != {self.attack != "stadv"}:
            raise ValueError(f"{self.name}: every attack but stadv has a norm and an eps, stadv has neither")
        if (self.weight is not None) != (self.attack == "aware_aid"):
            raise ValueError(f"{self.name}: aware_aid has a weight, and no other attack")
        if self.attack == "aware_aid" and self.draws > 1:
            raise ValueError(f"{self.name}: aware_aid asks nothing that draws, so its draws are 1")
        return self


class Effort(Strict):
    """What the attacks on one kind of defense may spend. Every count of steps is per image; 0 leaves an attack out."""

    images: PositiveInt
    """Attacked by every adaptive attack, so that each has a worst case."""
    bpda_steps: NonNegativeInt = 0
    bpda_draws: PositiveInt = 1
    full_steps: NonNegativeInt = 0
    full_draws: PositiveInt = 1
    apgd_steps: NonNegativeInt = 0
    apgd_draws: PositiveInt = 1
    square_queries: NonNegativeInt = 0
    aware_steps: NonNegativeInt = 0
    aware_weights: tuple[PositiveFloat, ...] = (1.0,)
    """How much fooling what the defense looks at counts beside fooling the classifier."""
    iterate_steps: NonNegativeInt = 0
    smooth_steps: NonNegativeInt = 0
    smooth_sharpness: tuple[PositiveFloat, ...] = (3.0,)
    """How closely the attacker's copy follows the sign, tanh(sharpness * u): small ones smooth, large ones exact."""
    curve_images: NonNegativeInt = 0
    """Attacked at every point of the curves: accuracy against eps, against steps, and against draws."""
    curve_eps: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)
    """Shares of the evaluation's eps."""
    curve_steps: tuple[PositiveInt, ...] = (1, 5, 20)
    curve_draws: tuple[PositiveInt, ...] = ()
    """Draws that the gradient of a random defense is averaged over; the curve shows whether EOT has enough of them."""
    unseen: bool = False
    """Whether level L6 is run: another norm, larger and smaller budgets, moved pixels, a known seed."""
    unseen_images: PositiveInt | None = None
    """How many of the images L6 attacks, if not all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for attack in ("bpda", "full", "apgd"):
            if getattr(self, f"{attack}_steps") and f"{attack}_draws" not in self.model_fields_set:
                raise ValueError(f"{attack}_steps need {attack}_draws: one draw is a weak attack on a random defense")
        if self.unseen_images is not None and not self.unseen:
            raise ValueError("unseen_images are for level L6, which unseen leaves out")
        return self


class Budget(Strict):
    """One budget. The attacked images are the first of the shuffled test images, for every defense.

    A recipe may leave out both efforts if it measures `grey_box_only` defenses alone.
    """

    clean_images: PositiveInt
    clean_draws: PositiveInt = 1
    """Random draws over which the standard accuracy of a random defense is averaged."""
    grey_box_images: PositiveInt
    costly_images: PositiveInt
    """Images for the defenses that descend at test time (AID, ZeroPur), clean and grey-box."""
    grey_box: tuple[GreyBoxName, ...] = ("fgsm", "pgd20")
    """The attacks of L1, see `training/grey_box.py`."""
    autoattack_images: PositiveInt = 512
    """How many of them AutoAttack attacks, if it is among those."""
    one_pass: Effort = Effort(images=1)
    """For the bare classifier and for defenses that purify in one pass (AToP)."""
    descending: Effort = Effort(images=1)
    """For defenses that descend at test time, each answer of which costs a hundred passes."""


FAR_EPS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
"""Shares of the evaluation's eps, up to where nothing should be left."""
BUDGETS: dict[BudgetName, Budget] = {
    "quick": Budget(
        clean_images=512,
        clean_draws=1,
        grey_box_images=128,
        costly_images=24,
        one_pass=Effort(
            images=64,
            bpda_steps=10,
            bpda_draws=4,
            full_steps=20,
            full_draws=4,
            apgd_steps=15,
            apgd_draws=4,
            square_queries=50,
            aware_steps=100,
            curve_images=12,
            curve_eps=(0.5, 1.0, 2.0, 8.0),
        ),
        descending=Effort(
            images=10,
            bpda_steps=0,
            bpda_draws=1,
            full_steps=8,  # one attack; three of a third of its steps would be weaker
            full_draws=1,
            square_queries=4,
            aware_steps=100,
            iterate_steps=3,
        ),
    ),
    "standard": Budget(
        clean_images=10_000,
        clean_draws=5,
        grey_box_images=2000,
        costly_images=512,
        grey_box=("fgsm", "pgd20", "autoattack"),
        one_pass=Effort(
            images=512,
            bpda_steps=50,
            bpda_draws=15,
            full_steps=50,
            full_draws=10,
            apgd_steps=50,
            apgd_draws=10,
            square_queries=1000,
            aware_steps=200,
            curve_images=128,
            curve_eps=FAR_EPS,
            curve_steps=(1, 5, 10, 20, 50, 100),
            curve_draws=(1, 5, 20),
            unseen=True,
        ),
        descending=Effort(
            images=64,
            bpda_steps=0,
            bpda_draws=1,
            full_steps=20,
            full_draws=1,
            apgd_steps=20,
            apgd_draws=1,
            square_queries=50,
            aware_steps=200,
            aware_weights=(0.1, 1.0, 10.0),
            curve_images=32,
            curve_eps=FAR_EPS,
            iterate_steps=20,
            smooth_steps=10,
            unseen=True,
        ),
    ),
    "paper": Budget(
        clean_images=10_000,
        clean_draws=5,
        grey_box_images=10_000,
        costly_images=512,
        grey_box=("fgsm", "pgd20", "autoattack"),
        one_pass=Effort(
            images=512,
            bpda_steps=100,
            bpda_draws=20,
            full_steps=200,
            full_draws=20,
            apgd_steps=100,
            apgd_draws=20,
            square_queries=5000,
            aware_steps=400,
            curve_images=512,
            curve_eps=FAR_EPS,
            curve_steps=(1, 5, 10, 20, 50, 100, 200, 400),
            curve_draws=(1, 5, 20, 50),
            unseen=True,
        ),
        descending=Effort(
            images=512,
            bpda_steps=50,
            bpda_draws=15,
            full_steps=200,
            full_draws=20,
            apgd_steps=100,
            apgd_draws=20,
            square_queries=5000,
            aware_steps=400,
            aware_weights=(0.01, 0.1, 1.0, 10.0, 100.0),
            curve_images=128,
            curve_eps=FAR_EPS,
            curve_steps=(1, 5, 10, 20, 50, 100, 200),
            iterate_steps=100,
            smooth_steps=100,
            smooth_sharpness=(1.0, 3.0, 10.0, 30.0),
            unseen=True,
        ),
    ),
}
