"""What `bundle.json` says: the schema of a bundle, without torch, so that a gateway can read it alone.

Every defense is written with all hyper-parameters of each of its presets: a bundle means the same however
the defaults of this code change later.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

SCHEMA_VERSION: Literal[1] = 1
Fraction = Annotated[float, Field(ge=0, le=1)]


class UnknownDefense(ValueError):
    """A defense, preset or chain that a bundle does not offer; the message is safe to show to a client."""


class Strict(BaseModel):
    """Frozen; a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassifierSpec(Strict):
    """The undefended classifier: a name of `models.classifiers.ARCHITECTURES`; its weights hold its normalization."""

    architecture: str
    mirrored: bool = False
    """Whether it answers with the mean of an image and its mirror image."""


class InpainterSpec(Strict):
    """The network that fills in what a random transform removed: one of convolutions."""

    architecture: Literal["unet", "deepfill"]
    width: PositiveInt
    """Channels of the first level: 32 is a light U-Net, 48 the published DeepFill."""
    space_to_depth: PositiveInt = 1
    """Side of the pixel blocks that the U-Net folds into channels, so that a large working image stays cheap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.architecture == "deepfill" and self.space_to_depth != 1:
            raise ValueError("deepfill has no space_to_depth")
        return self


class MaeSpec(Strict):
    """A masked autoencoder as in-painter: the "AE" of AToP's Table 5. ViT-B/16 is 16, 768, 12, 12, 512, 8, 16."""

    architecture: Literal["mae"]
    patch_size: PositiveInt
    """Side of the pixel blocks that are its tokens; a cell of the transform is a whole number of them wide."""
    width: PositiveInt
    """Channels of a token in the encoder."""
    depth: PositiveInt
    """Blocks of the encoder."""
    heads: PositiveInt
    decoder_width: PositiveInt
    decoder_depth: PositiveInt
    decoder_heads: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads or self.decoder_width % self.decoder_heads:
            raise ValueError("the widths of a mae must be divisible by its heads")
        if self.width % 4 or self.decoder_width % 4:
            raise ValueError("the widths of a mae must be multiples of 4")
        return self


AnyInpainterSpec = Annotated[InpainterSpec | MaeSpec, Field(discriminator="architecture")]


class AtopPreset(Strict):
    """AToP's random transform (§3.2): theta_t = (sigma, r, N) at a working size."""

    transform: Literal["rt1", "rt2", "rt3"]
    working_size: PositiveInt
    """Side of the square image that is transformed and in-painted."""
    sigma: NonNegativeFloat
    """Standard deviation of the Gaussian noise, per working pixel, on the scale where an image is [0, 1]."""
    mask_ratio: Fraction = 0.25
    """Share of the cells that are hidden; rt3 takes 1 / mask_ratio passes that hide each cell once."""
    cells_per_side: PositiveInt = 8

    @property
    def hidden_cells(self) -> int:
        """How many cells a pass hides: exactly floor(ratio * cells), not that many on average."""
        return int(self.mask_ratio * self.cells_per_side**2)

    @property
    def passes(self) -> int:
        """How often the in-painter runs: once, or for rt3 until every cell has been hidden."""
        return self.cells_per_side**2 // self.hidden_cells if self.transform == "rt3" else 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.working_size % self.cells_per_side:
            raise ValueError("working_size must be a multiple of cells_per_side")
        if self.transform == "rt3" and (self.hidden_cells == 0 or self.cells_per_side**2 % self.hidden_cells):
            raise ValueError("rt3 needs a mask_ratio that divides the cells into equal passes")
        if self.transform == "rt1" and self.sigma:
            raise ValueError("rt1 adds no noise: sigma must be 0")
        return self


def size_multiple(inpainter: InpainterSpec | MaeSpec, transform: AtopPreset) -> int:
    """What the working size must be divisible by, so that an in-painter can run on what a transform gives it."""
    match inpainter:
        case MaeSpec():
            return inpainter.patch_size * transform.cells_per_side
        case InpainterSpec(architecture="deepfill"):
            return 8
        case InpainterSpec():
            return 4 * inpainter.space_to_depth


class AtopSpec(Strict):
    """AToP: one in-painter, one or more transforms in front of it."""

    inpainter: AnyInpainterSpec
    default_preset: str
    presets: dict[str, AtopPreset]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, preset in self.presets.items():
            multiple = size_multiple(self.inpainter, preset)
            if preset.working_size % multiple:
                raise ValueError(f"{name}: this in-painter needs a multiple of {multiple} pixels")
        return self


class AidPreset(Strict):
    """AID's iterative purification (Algorithm 2)."""

    eps: PositiveFloat = 8 / 255
    step_size: PositiveFloat = 2 / 255
    steps: PositiveInt = 10


class AidSpec(Strict):
    """AID's discriminator (Table 4 of the paper, or the layout of its released code) and its purification presets."""

    layout: Literal["code", "paper"] = "code"
    taps: tuple[str, str]
    width: PositiveInt = 1024
    tap_layers: PositiveInt = 2
    """Hidden layers of each tap's own branch."""
    joint_layers: PositiveInt = Field(default_factory=lambda fields: 3 if fields["layout"] == "code" else 2)
    """Hidden layers after both branches are joined."""
    default_preset: str = "code"
    presets: dict[str, AidPreset] = {"code": AidPreset()}
    threshold: Fraction = 0.5
    """Images that score below are called suspicious."""


class BlurSpec(Strict):
    """The blur of ZeroPur: Gaussian, median, or total-variation minimization in their place (Table 7)."""

    kind: Literal["gaussian", "median", "tv"]
    size: PositiveFloat
    """Standard deviation of the Gaussian in pixels, side of the median, or weight of TV for images in [0, 1]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "median" and (self.size != int(self.size) or int(self.size) % 2 == 0):
            raise ValueError("a median blur has an odd whole side")
        return self


class ZeroPurPreset(Strict):
    """ZeroPur (Algorithms 1 and 2): coarse shifting, then fine alignment where `fine_steps` is not 0."""

    blur: BlurSpec
    eps: PositiveFloat = 10 / 255
    coarse_steps: NonNegativeInt = 10
    """With no steps at all, coarse or fine, what is left of the method is its blur."""
    coarse_step_size: PositiveFloat = 1 / 255
    momentum: NonNegativeFloat = 1.0
    """Momentum on the l1-normalized gradient; 0 is the paper's plain sign step."""
    coarse_layers: tuple[str, ...] = ()
    """Layers whose similarities coarse shifting ascends together (the paper's Table 12); none: the pooled embedding."""
    random_start: bool = False
    fine_steps: NonNegativeInt = 50
    fine_step_size: PositiveFloat = 0.2 / 255
    fine_layers: tuple[str, ...] = ()
    perceptual_weight: NonNegativeFloat = 0.0
    """Weight of the self-LPIPS term; where it is not 0 the projection is divided by its squared length."""
    projection_weight: PositiveFloat = 1.0
    """Weight of the projection beside that term; alone its scale means nothing, since steps are signs."""

    @property
    def layers(self) -> tuple[str, ...]:
        """All that a classifier must have."""
        return (*self.coarse_layers, *self.fine_layers)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fine_steps and not self.fine_layers:
            raise ValueError("fine alignment needs fine_layers")
        if self.fine_steps and not self.coarse_steps:
            raise ValueError("fine alignment follows what coarse shifting found: coarse_steps must not be 0")
        if not self.coarse_steps and (self.random_start or self.blur.kind == "tv"):
            raise ValueError("a blur alone has no random start, and is not tv, through which no gradient flows")
        if self.coarse_layers and not self.coarse_steps:
            raise ValueError("coarse_layers are for coarse shifting: coarse_steps must not be 0")
        return self


class ZeroPurSpec(Strict):
    """ZeroPur has no weights of its own: only presets."""

    default_preset: str
    presets: dict[str, ZeroPurPreset]


class AutoPreset(Strict):
    """A gate: images that AID scores below `threshold` take the strong chain, all others the cheap one."""

    strong: str
    cheap: str = "none"
    threshold: Fraction
    false_positive_rate: Fraction
    """Share of clean training images that score below the threshold: how often the strong chain runs for nothing."""


class AutoSpec(Strict):
    """`auto` has no weights of its own: it needs an AID, and the chains of its presets."""

    default_preset: str
    presets: dict[str, AutoPreset]


AnySpec = AtopSpec | AidSpec | ZeroPurSpec | AutoSpec


class Defenses(Strict):
    """The defenses that a bundle offers; what is absent is not offered."""

    atop: AtopSpec | None = None
    aid: AidSpec | None = None
    zeropur: ZeroPurSpec | None = None
    auto: AutoSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, spec in self.offered().items():
            if spec.default_preset not in spec.presets:
                raise ValueError(f"the default preset {spec.default_preset!r} of {name} is not among its presets")
        return self

    def offered(self) -> dict[str, AnySpec]:
        """Name to spec, of those that are there."""
        specs = {"atop": self.atop, "aid": self.aid, "zeropur": self.zeropur, "auto": self.auto}
        return {name: spec for name, spec in specs.items() if spec is not None}


class Manifest(Strict):
    """The content of `bundle.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    input_size: tuple[PositiveInt, PositiveInt]
    """Height and width in pixels."""
    classifier: ClassifierSpec
    defenses: Defenses
    default_defense: str
    provenance: dict[str, object] = {}
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}
    """Name to sha256 of every other file of the bundle."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [name for name, _ in self.chain(self.default_defense)] == ["zeropur"]:
            raise ValueError("zeropur alone is no default_defense: it turns clean images away from their right answer")
        for name, gate in (self.defenses.auto.presets if self.defenses.auto else {}).items():
            if self.defenses.aid is None:
                raise ValueError("auto needs aid, whose score decides")
            if any(step == "auto" for chain in (gate.cheap, gate.strong) for step, _ in self.chain(chain)):
                raise ValueError(f"preset {name} of auto stands behind itself")
        atop = self.defenses.atop
        if atop and any(preset.working_size < max(self.input_size) for preset in atop.presets.values()):
            raise ValueError("the working_size of atop is smaller than the input")
        return self

    @property
    def weights(self) -> dict[str, str]:
        """The sha256 of every file of weights."""
        return {name: sha256 for name, sha256 in self.files.items() if name.endswith(".safetensors")}

    @property
    def aid_threshold(self) -> float | None:
        """The score below which an image is suspicious; None without AID."""
        return None if self.defenses.aid is None else self.defenses.aid.threshold

    def resolve(self, defense: str) -> str:
        """The canonical text of a chain such as `atop:rt3,aid`; raises UnknownDefense."""
        return (
            ",".join(
                name if preset == self._spec(name).default_preset else f"{name}:{preset}"
                for name, preset in self.chain(defense)
            )
            or "none"
        )

    def chain(self, defense: str) -> list[tuple[str, str]]:
        """The steps (name, preset) of a chain, left to right; none for `none`. Raises UnknownDefense."""
        if defense == "none":
            return []
        steps = list[tuple[str, str]]()
        for step in defense.split(","):
            name, colon, preset = step.partition(":")
            spec = self._spec(name)
            preset = preset if colon else spec.default_preset
            if preset not in spec.presets:
                raise UnknownDefense(f"defense {name} has the presets {', '.join(spec.presets)}")
            if name in (known for known, _ in steps):
                raise UnknownDefense(f"defense {name} stands twice in the chain")
            steps.append((name, preset))
        if len(steps) > 1 and any(name == "auto" for name, _ in steps):
            raise UnknownDefense("auto stands alone, not in a chain: its presets name chains")
        return steps

    def gate(self, defense: str) -> AutoPreset | None:
        """What decides image by image where the defense is `auto`, else None. Raises UnknownDefense."""
        chain = self.chain(defense)
        if self.defenses.auto is None or len(chain) != 1 or chain[0][0] != "auto":
            return None
        return self.defenses.auto.presets[chain[0][1]]

    def is_random(self, defense: str) -> bool:
        """Whether the chain draws anything, so that its answer depends on a seed. Raises UnknownDefense."""
        return any(self._draws(name, preset) for name, preset in self.chain(defense))

    def _draws(self, name: str, preset: str) -> bool:
        match self._spec(name):
            case AtopSpec():
                return True
            case ZeroPurSpec(presets=presets):
                return presets[preset].random_start
            case AutoSpec(presets=gates):
                return self.is_random(gates[preset].cheap) or self.is_random(gates[preset].strong)
        return False

    def _spec(self, name: str) -> AnySpec:
        offered = self.defenses.offered()
        if name == "none":
            raise UnknownDefense("none stands alone, not in a chain")
        if name not in offered:
            raise UnknownDefense(f"model {self.name} offers the defenses none, {', '.join(offered)}")
        return offered[name]
