"""The manifest of fake bundles. No torch."""

from __future__ import annotations

from models.manifest import (
    AidPreset,
    AidSpec,
    AtopPreset,
    AtopSpec,
    AutoPreset,
    AutoSpec,
    BlurSpec,
    ClassifierSpec,
    Defenses,
    InpainterSpec,
    Manifest,
    ZeroPurPreset,
    ZeroPurSpec,
)

SIDE = 8
CLASSES = ("red", "green", "blue")


def fake_manifest(name: str = "colors", version: str = "1", *, aid: bool = True, auto: bool = False) -> Manifest:
    """Three colors at 8 × 8, every defense."""
    rt3 = AtopPreset(transform="rt3", working_size=SIDE, sigma=0.25, cells_per_side=4)
    rt1 = AtopPreset(transform="rt1", working_size=SIDE, sigma=0.0, cells_per_side=4)
    gate = AutoPreset(strong="zeropur", threshold=0.2, false_positive_rate=0.01)
    coarse = ZeroPurPreset(blur=BlurSpec(kind="median", size=3), fine_steps=0)
    return Manifest(
        name=name,
        version=version,
        classes=CLASSES,
        input_size=(SIDE, SIDE),
        classifier=ClassifierSpec(architecture="none"),
        defenses=Defenses(
            atop=AtopSpec(
                inpainter=InpainterSpec(architecture="unet", width=1),
                default_preset="rt3",
                presets={"rt3": rt3, "rt1": rt1},
            ),
            aid=AidSpec(taps=("a", "b"), presets={"code": AidPreset()}) if aid else None,
            zeropur=ZeroPurSpec(default_preset="coarse", presets={"coarse": coarse}),
            auto=AutoSpec(default_preset="zeropur", presets={"zeropur": gate}) if auto else None,
        ),
        default_defense="atop",
    )
