from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.manifest import (
    AidSpec,
    AtopPreset,
    AtopSpec,
    BlurSpec,
    Defenses,
    InpainterSpec,
    MaeSpec,
    Manifest,
    UnknownDefense,
    ZeroPurPreset,
)
from tests.networks import tiny_manifest


@pytest.mark.parametrize(
    ("asked", "canonical", "chain"),
    [
        ("none", "none", []),
        ("atop", "atop", [("atop", "rt2")]),
        ("atop:rt2", "atop", [("atop", "rt2")]),
        ("atop:rt3", "atop:rt3", [("atop", "rt3")]),
        ("zeropur:coarse", "zeropur:coarse", [("zeropur", "coarse")]),
        ("atop,aid", "atop,aid", [("atop", "rt2"), ("aid", "code")]),
        ("aid,atop:rt1", "aid,atop:rt1", [("aid", "code"), ("atop", "rt1")]),
    ],
)
def test_chains_resolve_to_names_and_presets(asked: str, canonical: str, chain: list[tuple[str, str]]) -> None:
    manifest = tiny_manifest()

    assert manifest.chain(asked) == chain
    assert manifest.resolve(asked) == canonical


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("", "offers the defenses none, atop, aid, zeropur"),
        ("magic", "offers the defenses none, atop, aid, zeropur"),
        ("none,atop", "none stands alone"),
        ("atop,", "offers the defenses"),
        ("atop:rt9", "defense atop has the presets rt1, rt2, rt3"),
        ("atop:", "defense atop has the presets"),
        ("atop,aid,atop:rt1", "defense atop stands twice"),
        (" atop", "offers the defenses"),
    ],
)
def test_what_a_bundle_does_not_offer_is_refused_with_what_it_does(asked: str, reason: str) -> None:
    with pytest.raises(UnknownDefense, match=reason):
        tiny_manifest().resolve(asked)


@pytest.mark.parametrize(
    ("defense", "draws"),
    [
        ("none", False),
        ("atop", True),
        ("atop:rt1", True),
        ("aid", False),
        ("zeropur", False),
        ("zeropur:started", True),
        ("aid,zeropur:coarse", False),
        ("aid,zeropur:started", True),
        ("zeropur,atop", True),
    ],
)
def test_a_chain_is_random_if_one_of_its_steps_draws(defense: str, draws: bool) -> None:
    manifest = tiny_manifest()
    assert manifest.defenses.zeropur is not None
    started = manifest.defenses.zeropur.presets["coarse"].model_copy(update={"random_start": True})
    manifest.defenses.zeropur.presets["started"] = started

    assert manifest.is_random(defense) is draws


def test_it_survives_json_whole() -> None:
    manifest = tiny_manifest()

    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"name": "../etc"},
        {"version": "0"},
        {"version": "latest"},
        {"classes": ["one"]},
        {"input_size": [0, 32]},
        {"default_defense": "magic"},
        {"default_defense": "zeropur"},
        {"default_defense": "zeropur:coarse"},
        {"files": {"weights": "abc"}},
        {"unknown_field": 1},
    ],
)
def test_a_manifest_that_says_something_impossible_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValidationError, UnknownDefense)):
        Manifest.model_validate({**tiny_manifest().model_dump(mode="json"), **change})


def test_a_default_preset_must_exist() -> None:
    defenses = tiny_manifest().defenses.model_dump(mode="json")
    defenses["atop"]["default_preset"] = "rt9"

    with pytest.raises(ValidationError, match="not among its presets"):
        Defenses.model_validate(defenses)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transform": "rt2", "working_size": 30, "sigma": 0.1}, "multiple of cells_per_side"),
        ({"transform": "rt1", "working_size": 32, "sigma": 0.1}, "adds no noise"),
        ({"transform": "rt3", "working_size": 32, "sigma": 0.1, "mask_ratio": 0.3}, "equal passes"),
        ({"transform": "rt2", "working_size": 32, "sigma": -1}, "greater than or equal to 0"),
        ({"transform": "rt4", "working_size": 32, "sigma": 0}, "rt1"),
    ],
)
def test_impossible_transforms_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        AtopPreset.model_validate(settings)


@pytest.mark.parametrize(
    ("ratio", "transform", "hidden", "passes"),
    [(0.25, "rt2", 16, 1), (0.1, "rt2", 6, 1), (0.0, "rt2", 0, 1), (0.25, "rt3", 16, 4), (0.125, "rt3", 8, 8)],
)
def test_a_mask_hides_the_floor_of_its_share_and_rt3_hides_every_cell_once(
    ratio: float, transform: str, hidden: int, passes: int
) -> None:
    preset = AtopPreset.model_validate({"transform": transform, "working_size": 32, "sigma": 0.1, "mask_ratio": ratio})

    assert (preset.hidden_cells, preset.passes) == (hidden, passes)


def test_working_sizes_must_suit_the_in_painter_and_the_input() -> None:
    manifest = tiny_manifest().model_dump(mode="json")
    small = {"transform": "rt2", "working_size": 8, "sigma": 0.1}
    with pytest.raises(ValidationError, match="smaller than the input"):
        Manifest.model_validate({**manifest, "defenses": {"atop": atop_spec(small)}})
    odd = {"transform": "rt2", "working_size": 24, "sigma": 0.1}
    with pytest.raises(ValidationError, match="needs a multiple of 16 pixels"):
        AtopSpec.model_validate(atop_spec(odd, space_to_depth=4))
    with pytest.raises(ValidationError, match="deepfill has no space_to_depth"):
        InpainterSpec(architecture="deepfill", width=48, space_to_depth=2)


def atop_spec(preset: dict[str, object], **inpainter: object) -> dict[str, object]:
    network = {"architecture": "unet", "width": 4, **inpainter}
    return {"inpainter": network, "default_preset": "rt2", "presets": {"rt2": preset}}


MAE = {
    "architecture": "mae",
    **{"patch_size": 4, "width": 16, "depth": 1, "heads": 2},
    **{"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2},
}


def test_a_bundle_says_what_its_in_painter_is_made_of_and_no_more() -> None:
    preset = {"transform": "rt2", "working_size": 32, "sigma": 0.1}
    spec = AtopSpec.model_validate({**atop_spec(preset), "inpainter": MAE})

    assert spec.inpainter == MaeSpec.model_validate(MAE)
    assert spec.model_dump()["inpainter"] == MAE
    assert AtopSpec.model_validate_json(spec.model_dump_json()) == spec
    unet = AtopSpec.model_validate(atop_spec(preset)).model_dump()["inpainter"]
    assert unet == {"architecture": "unet", "width": 4, "space_to_depth": 1}


def test_the_cells_of_a_mask_are_whole_patches_of_an_autoencoder() -> None:
    def spec(working_size: int, cells_per_side: int) -> AtopSpec:
        preset = {"transform": "rt2", "working_size": working_size, "sigma": 0.1, "cells_per_side": cells_per_side}
        return AtopSpec.model_validate({**atop_spec(preset), "inpainter": MAE})

    assert spec(32, 8).presets["rt2"].working_size == 32
    assert spec(48, 4).presets["rt2"].working_size == 48
    with pytest.raises(ValidationError, match="rt2: this in-painter needs a multiple of 32 pixels"):
        spec(48, 8)
    with pytest.raises(ValidationError, match="rt2: this in-painter needs a multiple of 64 pixels"):
        spec(32, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 3}, "divisible by its heads"),
        ({"decoder_heads": 3}, "divisible by its heads"),
        ({"width": 18}, "multiples of 4"),
        ({"decoder_width": 10}, "multiples of 4"),
        ({"patch_size": 0}, "greater than 0"),
        ({"depth": None}, "valid integer"),
        ({"space_to_depth": 1}, "not permitted"),
        ({"architecture": "vit"}, "'unet', 'deepfill', 'mae'"),
    ],
)
def test_impossible_autoencoders_are_refused(change: dict[str, object], reason: str) -> None:
    preset = {"transform": "rt2", "working_size": 32, "sigma": 0.1}
    with pytest.raises(ValidationError, match=reason):
        AtopSpec.model_validate({**atop_spec(preset), "inpainter": {**MAE, **change}})


def test_the_joint_layers_of_aid_follow_its_layout() -> None:
    assert AidSpec(taps=("a", "b")).joint_layers == 3
    assert AidSpec(taps=("a", "b"), layout="paper").joint_layers == 2


def test_impossible_blurs_and_alignments_are_refused() -> None:
    with pytest.raises(ValidationError, match="odd whole side"):
        BlurSpec(kind="median", size=4)
    with pytest.raises(ValidationError, match="odd whole side"):
        BlurSpec(kind="median", size=2.5)
    median = BlurSpec(kind="median", size=3)
    with pytest.raises(ValidationError, match="needs fine_layers"):
        ZeroPurPreset(blur=median)
    with pytest.raises(ValidationError, match="coarse_steps must not be 0"):
        ZeroPurPreset(blur=median, coarse_steps=0, fine_layers=("stage2",))
    with pytest.raises(ValidationError, match="coarse_layers are for coarse shifting"):
        ZeroPurPreset(blur=median, coarse_steps=0, fine_steps=0, coarse_layers=("stage2",))
    with pytest.raises(ValidationError, match="has no random start"):
        ZeroPurPreset(blur=median, coarse_steps=0, fine_steps=0, random_start=True)
    with pytest.raises(ValidationError, match="is not tv"):
        ZeroPurPreset(blur=BlurSpec(kind="tv", size=0.1), coarse_steps=0, fine_steps=0)


def test_without_aid_there_is_no_threshold() -> None:
    manifest = tiny_manifest()
    without = manifest.model_copy(update={"defenses": manifest.defenses.model_copy(update={"aid": None})})

    assert manifest.aid_threshold == 0.5
    assert without.aid_threshold is None


def test_the_schema_reads_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import models.manifest"

    subprocess.run([sys.executable, "-c", code], check=True)
