"""Recipes: one frozen model per command. `reading.py` reads them from files, or makes one from a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from models.classifiers import ARCHITECTURES, Classifier
from models.manifest import (
    AidPreset,
    AidSpec,
    AnyInpainterSpec,
    AtopPreset,
    Fraction,
    Strict,
    ZeroPurPreset,
    size_multiple,
)
from models.randomness import SEED_LIMIT
from training.adversarial import AdversarialTraining
from training.augmentation import Augmentation
from training.budgets import BUDGETS, Budget, BudgetName, FurtherAttack
from training.precision import Precision

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a moving average: 1 would never move."""
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and every wrong field."""


class DataRecipe(Strict):
    """Where the images come from: a name on the hub, or a folder in one of several formats (see `training.data`)."""

    name: str
    source: str
    input_size: PositiveInt
    train_split: str = "train"
    test_split: str = "test"
    classes: tuple[str, ...] | None = None
    """Class names, where the data set itself carries only numbers, or others than are wanted."""
    label_column: str | None = None
    """Which labels to learn, where the data have several: CIFAR-100's are `fine_label` and `coarse_label`."""


class Recipe(Strict):
    """What every training command needs. `name` is the run's directory below the runs folder."""

    name: RunName
    seed: Seed = 0
    data: DataRecipe
    batch_size: PositiveInt
    epochs: PositiveFloat
    """Passes over the training split; a fraction is allowed."""
    checkpoint_every_s: PositiveFloat = 60
    precision: Precision = "bfloat16"
    """What convolutions and products are computed in while training; weights and updates stay float32."""


class ClassifierRecipe(Recipe):
    """`train-classifier`: SGD with Nesterov momentum, linear warm-up, cosine decay, an average of the weights."""

    architecture: str
    initial_run: RunName | None = None
    """A finished run of the same architecture whose averaged weights this one starts from; None starts from nothing."""
    mirrored: bool = False
    """Answer with the mean of an image and its mirror image; training is the same."""
    augmentation: Augmentation = Augmentation()
    lr: PositiveFloat
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    warmup_epochs: NonNegativeFloat = 2
    label_smoothing: Fraction = 0.0
    cutmix: Fraction = 0.0
    """Share of the batches in which a box of every image is replaced by that of another (Yun et al., 2019)."""
    average_decay: Decay = 0.99
    """Decay of the exponential moving average of the weights, per step; the average is what is kept."""
    adversarial: AdversarialTraining | None = None
    """How the training images are made adversarial; None trains on them as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}; known: {sorted(ARCHITECTURES)}")
        with torch.device("meta"):  # nothing is computed; it raises ValueError if the images are too small
            ARCHITECTURES[self.architecture](2, self.data.input_size)
        if self.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs must be smaller than epochs")
        return self


class PurifierRecipe(Recipe):
    """What the two stages of AToP share: the in-painter, its random transform and its reconstruction losses."""

    inpainter: AnyInpainterSpec
    transform: AtopPreset
    augmentation: Augmentation = Augmentation(padding=0)
    lr: PositiveFloat
    final_lr_ratio: Fraction = 1.0
    """The learning rate falls along a cosine to this share of `lr`; 1 keeps it constant, as the paper does."""
    betas: tuple[Decay, Decay] = (0.5, 0.999)
    reconstruction: Literal["l1", "mse"] = "l1"
    """Mean absolute error, which the paper adds to the GAN's loss, or mean squared error, that of an autoencoder."""
    gan_weight: NonNegativeFloat = 1.0
    """Weight of the generator's adversarial loss; 0 trains without a discriminator."""
    gan_gradient: bool = True
    """False reproduces the released fine-tuning, whose GAN term never reaches the purifier."""
    discriminator_width: PositiveInt = 64
    average_decay: Decay = 0.0
    """Decay of an exponential moving average of the purifier's weights, per step; 0 keeps the last weights."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        multiple = size_multiple(self.inpainter, self.transform)
        if self.transform.working_size % multiple:
            raise ValueError(f"this in-painter needs a transform.working_size that is a multiple of {multiple}")
        if self.transform.working_size < self.data.input_size:
            raise ValueError("transform.working_size must not be smaller than data.input_size")
        if self.inpainter.architecture == "deepfill" and self.inpainter.width % 4:
            raise ValueError("the width of a deepfill in-painter is a multiple of 4")
        return self


class PretrainRecipe(PurifierRecipe):
    """`pretrain-purifier`: learn to in-paint and denoise clean images (AToP §3.2, L_org)."""


class FinetuneRecipe(PurifierRecipe):
    """`finetune-atop`: reconstruction, GAN and classification loss through the frozen classifier (AToP Eq. 9)."""

    classifier_run: RunName
    purifier_run: RunName
    """The pre-training run that this one starts from; its in-painter must be the same."""
    attacked_fraction: Fraction = 1.0
    """Share of the images that FGSM attacks: 1 is the paper's adversarial variant, 0 its clean variant."""
    attack_eps: PositiveFloat = 8 / 255
    attack_noise: NonNegativeFloat = 0.0
    """Half the width of the uniform noise that FGSM starts from, in units of `attack_eps` (N-FGSM; 0 is the paper's).

    End to end the purifier learns from its own gradient, and may otherwise learn to be blind to one step of it.
    """
    attack_end_to_end: bool = False
    """Whether FGSM attacks classifier, purifier and transform together, as Eq. 9 reads, or the classifier alone."""
    reconstruction_target: Literal["clean", "input"] = "clean"
    """What both losses of the reconstruction call real: the clean image, or the purifier's own (attacked) input."""
    classification_weight: NonNegativeFloat = 0.1
    """Lambda of Eq. 9."""
    classification_from_epoch: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.classification_from_epoch >= self.epochs:
            raise ValueError("classification_from_epoch must be smaller than epochs")
        return self


class AidRecipe(Recipe):
    """`train-aid`: one epoch of AVmixup against PGD on the frozen classifier (AID Algorithm 1)."""

    classifier_run: RunName
    discriminator: AidSpec
    augmentation: Augmentation = Augmentation()
    lr: PositiveFloat = 0.01
    momentum: Decay = 0.9
    weight_decay: NonNegativeFloat = 2e-4
    attack_eps: PositiveFloat = 8 / 255
    attack_step_size: PositiveFloat = 1 / 255
    attack_steps: PositiveInt = 10
    gamma: PositiveFloat = 1.5
    """How far the AVmixup vertex lies beyond the adversarial image."""
    false_positive_rate: Fraction = 0.05
    """Share of clean training images that the bundle's threshold may call suspicious."""


class GateRecipe(Strict):
    """A preset of `auto`: its threshold is that of the AID run at `false_positive_rate`."""

    strong: str
    cheap: str = "none"
    false_positive_rate: Fraction


class ExportRecipe(Strict):
    """`export`: runs on disk become a bundle."""

    name: RunName
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
    classifier_run: RunName
    atop_run: RunName | None = None
    atop_of_another: bool = False
    """Whether the in-painter may have been fine-tuned for another classifier. AToP's authors put that for WRN-28-10 in
    front of a WRN-70-16 too."""
    atop_presets: dict[str, AtopPreset] = Field(default_factory=dict)
    atop_default_preset: str = "rt2"
    aid_run: RunName | None = None
    aid_presets: dict[str, AidPreset] = Field(default_factory=dict)
    aid_default_preset: str = "code"
    zeropur_presets: dict[str, ZeroPurPreset] = Field(default_factory=dict)
    zeropur_default_preset: str = "code"
    auto_presets: dict[str, GateRecipe] = Field(default_factory=dict)
    auto_default_preset: str = "zeropur"
    default_defense: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.atop_run is None) != (not self.atop_presets):
            raise ValueError("atop_run and atop_presets need each other")
        if self.atop_of_another and self.atop_run is None:
            raise ValueError("atop_of_another needs an atop_run")
        if (self.aid_run is None) != (not self.aid_presets):
            raise ValueError("aid_run and aid_presets need each other")
        if self.auto_presets and self.aid_run is None:
            raise ValueError("auto_presets need an aid_run, whose score decides")
        for name, presets, default in self._offered():
            if presets and default not in presets:
                raise ValueError(f"{name}_default_preset {default!r} is not among the {name}_presets")
        known = {name for name, presets, _ in self._offered() if presets}
        known |= {f"{name}:{preset}" for name, presets, _ in self._offered() for preset in presets}
        if self.default_defense != "none" and not known.issuperset(self.default_defense.split(",")):
            raise ValueError(f"default_defense {self.default_defense!r} is not among what this bundle offers")
        return self

    def _offered(self) -> tuple[tuple[str, Mapping[str, object], str], ...]:
        return (
            ("atop", self.atop_presets, self.atop_default_preset),
            ("aid", self.aid_presets, self.aid_default_preset),
            ("zeropur", self.zeropur_presets, self.zeropur_default_preset),
            ("auto", self.auto_presets, self.auto_default_preset),
        )


class EvaluateRecipe(Strict):
    """`evaluate`: levels L0 (clean) to L6 (unseen threats) for a bundle and its defenses, into its report."""

    name: RunName = "report"
    """What the copy of the report beside the findings is called."""
    seed: Seed = 0
    data: DataRecipe
    defenses: tuple[str, ...] = ()
    """Which ones; none given: every defense of the bundle at its default preset."""
    grey_box_only: tuple[str, ...] = ()
    """Further ones, of which L0, L1 and `further` are measured: they have no worst case and are not credible."""
    eps: PositiveFloat = 8 / 255
    budget: BudgetName | Budget = "standard"
    """A name (see `training/budgets.py`), or every number spelt out."""
    batch_size: PositiveInt = 64
    votes: Annotated[int, Field(ge=1, le=64)] = 1
    """Draws of a random defense that every answer is the mean of, as in a request; attacks see the mean too. Not for a
    bundle's own report, which is of one draw, as the service answers by default."""
    zeropur_variants: dict[RunName, dict[str, Any]] = Field(default_factory=dict)
    """Presets that the bundle does not offer, by what differs from its default preset of ZeroPur."""
    further: tuple[FurtherAttack, ...] = ()
    """Attacks on every defense beside those of the budget, outside the worst case and a bundle's own report."""
    transfer_from: tuple[str, ...] = ()
    """Bundles on disk whose classifiers' adversarial images are tried as well."""

    @field_validator("budget", mode="before")
    @classmethod
    def _check_name(cls, budget: object) -> object:
        if isinstance(budget, str) and budget not in BUDGETS:
            raise ValueError(f"a budget is {', '.join(BUDGETS)}, or a table that spells every number out")
        return budget

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({attack.name for attack in self.further}) < len(self.further):
            raise ValueError("two attacks of `further` have one name")
        efforts = {"one_pass", "descending"}
        judged = set(self.defenses) != {"none"} or bool(self.transfer_from)
        if isinstance(self.budget, Budget) and judged and not efforts <= self.budget.model_fields_set:
            raise ValueError("a budget for anything but grey_box_only defenses needs one_pass and descending")
        if both := (set(self.defenses) | {"none"}) & set(self.grey_box_only):
            raise ValueError(f"{', '.join(sorted(both))}: in defenses and in grey_box_only")
        return self

    @property
    def effort(self) -> Budget:
        """The budget's numbers."""
        return BUDGETS[self.budget] if isinstance(self.budget, str) else self.budget


def refuse_unknown_layers(classifier: Classifier, names: Sequence[str]) -> None:
    """Raise RecipeError for layers that the classifier does not have."""
    try:
        classifier.refuse_unknown(names)
    except KeyError as error:
        raise RecipeError(error.args[0]) from error
