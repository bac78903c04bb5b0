from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from models import load_bundle
from tests.training.tiny import TRANSFORM, Workshop, assert_same, color_set
from training.data import to_float
from training.runs import read_summary_of
from training.trained import trained_classifier, trained_discriminator, trained_inpainter

CPU = torch.device("cpu")
IMAGES = to_float(color_set(6, seed=2).images, CPU)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_bundle_has_the_runs_networks_as_float16(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    assert bundle.inpainter is not None
    assert bundle.discriminator is not None

    classifier = trained_classifier(finished.runs, "classifier", CPU)
    torch.testing.assert_close(bundle.classifier(IMAGES), classifier(IMAGES), rtol=0.02, atol=0.02)
    pairs = [
        (bundle.inpainter, trained_inpainter(finished.runs, "atop", CPU)),
        (bundle.discriminator, trained_discriminator(finished.runs, "aid", CPU)[0]),
    ]
    for shipped, trained in pairs:
        for name, value in trained.state_dict().items():
            expected = value.half().float() if value.is_floating_point() else value
            assert torch.equal(shipped.state_dict()[name], expected)


def test_the_manifest_says_what_the_recipe_and_the_runs_say(finished: Workshop) -> None:
    manifest = load_bundle(finished.bundle).manifest
    assert (manifest.name, manifest.version, manifest.default_defense) == ("colors", "1", "atop")
    assert manifest.classes == ("red", "green", "blue")
    assert manifest.input_size == (8, 8)
    assert manifest.classifier.architecture == "wrn-16-2"
    assert manifest.classifier.mirrored
    assert manifest.defenses.atop is not None
    assert manifest.defenses.atop.inpainter.width == 4
    assert manifest.defenses.atop.presets["rt3"].transform == "rt3"
    assert manifest.aid_threshold == read_summary_of(finished.runs, "aid")["threshold"]
    assert manifest.defenses.aid is not None
    assert manifest.defenses.aid.taps == ("stage1", "stage3")
    assert manifest.defenses.zeropur is not None
    assert manifest.defenses.zeropur.presets["code"].fine_layers == ("stage2",)
    assert manifest.defenses.auto is not None
    gate = manifest.defenses.auto.presets["zeropur"]
    assert (gate.strong, gate.cheap, gate.false_positive_rate) == ("zeropur", "none", 0.05)
    assert gate.threshold == read_summary_of(finished.runs, "aid")["threshold_at_0.05"]


def test_a_gate_at_a_rate_that_was_not_calibrated_is_refused(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = {"zeropur": {"strong": "zeropur", "false_positive_rate": 0.03}}
    assert finished.run("export", {"version": "9", "auto_presets": gates}) == 2
    assert "run aid has thresholds at the rates 0.001, " in capsys.readouterr().err
    assert not (finished.bundle.parent / "9").exists()


def test_the_provenance_is_enough_to_make_the_bundle_again(finished: Workshop) -> None:
    provenance = json.loads((finished.bundle / "bundle.json").read_text())["provenance"]
    assert list(provenance["runs"]) == ["classifier", "purifier", "atop", "aid"]
    for run in provenance["runs"].values():
        assert run["recipe"]["data"]["name"] == "colors"
        assert run["summary"]["data_sha256"] == color_set(48).fingerprint()
        assert run["summary"]["wall_s"] > 0
    assert provenance["runs"]["classifier"]["recipe"]["seed"] == 1
    assert provenance["networks"] == {"classifier": "classifier", "inpainter": "atop", "discriminator": "aid"}
    assert {"git_commit", "libraries", "hardware"} <= provenance.keys()
    assert str(finished.folder) not in json.dumps(provenance)


def test_the_provenance_goes_back_to_the_first_run(finished: Workshop) -> None:
    second = {"name": "second", "initial_run": "classifier", "epochs": 0.5, "warmup_epochs": 0}
    assert finished.run("train-classifier", second) == 0
    tuned = {"name": "tuned", "purifier_run": "atop", "classifier_run": "second", "epochs": 0.5}
    assert finished.run("finetune-atop", tuned) == 0
    without_aid = {"aid_run": None, "aid_presets": None, "auto_presets": None}
    changes = {"name": "tuned", "classifier_run": "second", "atop_run": "tuned", **without_aid}
    assert finished.run("export", changes) == 0
    bundle = finished.bundle.parents[1] / "tuned" / "1"
    provenance = json.loads((bundle / "bundle.json").read_text())["provenance"]
    assert list(provenance["runs"]) == ["classifier", "second", "purifier", "atop", "tuned"]
    assert provenance["networks"] == {"classifier": "second", "inpainter": "tuned"}


def test_a_version_that_is_there_is_never_written_again(finished: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished.bundle)
    assert finished.run("export") == 2
    assert "already holds a bundle" in capsys.readouterr().err
    assert contents(finished.bundle) == before
    assert finished.run("export", {"version": "2"}) == 0
    assert load_bundle(finished.bundle.parent / "2").manifest.version == "2"


def test_a_bundle_may_offer_zeropur_alone(finished: Workshop) -> None:
    changes = {
        "name": "plain",
        "atop_run": None,
        "atop_presets": None,
        "aid_run": None,
        "aid_presets": None,
        "auto_presets": None,
        "zeropur_presets": {"code": {"blur": {"kind": "median", "size": 3}, "fine_steps": 0}},
        "default_defense": "none",
    }
    assert finished.run("export", changes) == 0
    manifest = load_bundle(finished.bundle.parents[1] / "plain" / "1").manifest
    assert list(manifest.defenses.offered()) == ["zeropur"]
    assert list(manifest.files) == ["classifier.safetensors"]


def test_a_run_that_is_not_finished_is_not_exported(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("train-classifier", {"epochs": 0.5, "warmup_epochs": 0}) == 0
    (workshop.runs / "classifier" / "summary.json").unlink()
    assert workshop.run("export") == 2
    assert "run classifier" in capsys.readouterr().err
    assert not workshop.bundle.exists()


def test_presets_that_do_not_fit_the_trained_in_painter_are_refused_and_nothing_is_written(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**TRANSFORM, "working_size": 10, "cells_per_side": 5}
    changes = {"name": "wrong", "atop_presets": {"rt2": wrong}, "default_defense": "none"}
    assert finished.run("export", changes) == 2
    assert "multiple of 4 pixels" in capsys.readouterr().err
    assert not (finished.bundle.parents[1] / "wrong").exists()


@pytest.mark.parametrize("changes", [{"fine_layers": ["stage9"]}, {"fine_steps": 0, "coarse_layers": ["stage9"]}])
def test_layers_that_the_classifier_does_not_have_are_refused_and_nothing_is_written(
    finished: Workshop, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    wrong = {"blur": {"kind": "gaussian", "size": 0.6}, **changes}
    assert finished.run("export", {"name": "wrong", "zeropur_presets": {"code": wrong}}) == 2
    assert "stage9" in capsys.readouterr().err
    assert not (finished.bundle.parents[1] / "wrong").exists()


def test_a_defense_that_was_trained_for_another_classifier_is_refused(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.run("train-classifier", {"name": "another", "epochs": 0.5, "warmup_epochs": 0}) == 0
    assert finished.run("export", {"name": "wrong", "classifier_run": "another"}) == 2
    assert "was trained for another classifier" in capsys.readouterr().err
    assert not (finished.bundle.parents[1] / "wrong").exists()
    without_aid = {"aid_run": None, "aid_presets": None, "auto_presets": None}
    reused = {"name": "reused", "classifier_run": "another", "atop_of_another": True, **without_aid}
    assert finished.run("export", reused) == 0
    bundle = load_bundle(finished.bundle.parents[1] / "reused" / "1")
    shipped = load_bundle(finished.bundle)
    assert bundle.inpainter is not None
    assert shipped.inpainter is not None
    assert_same(bundle.inpainter.state_dict(), shipped.inpainter.state_dict())
    capsys.readouterr()
    reused_aid = {**reused, "name": "wrong", "aid_run": "aid", "aid_presets": {"code": {"steps": 2}}}
    assert finished.run("export", reused_aid) == 2
    assert "run aid was trained for another classifier" in capsys.readouterr().err
