"""A bundle becomes runs again, and others build on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import BundleError, load_bundle
from tests.training.tiny import Interrupted, Workshop, assert_same
from training.__main__ import main
from training.provenance import content_sha256
from training.runs import RunError, read_checkpoint
from training.trained import trained_classifier, trained_discriminator, trained_inpainter
from training.unpack import last_runs, told_runs

CPU = torch.device("cpu")


def unpack(bundle: Path, runs: Path) -> int:
    return main(["unpack", "--bundle", str(bundle), "--runs", str(runs)])


def test_the_runs_have_the_bundles_weights(
    finished: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unpack(finished.bundle, tmp_path) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name) for name in ("classifier", "purifier", "atop", "aid")
    ]
    bundle = load_bundle(finished.bundle)
    assert bundle.inpainter is not None
    assert bundle.discriminator is not None
    pairs = [
        (trained_classifier(tmp_path, "classifier", CPU), bundle.classifier),
        (trained_inpainter(tmp_path, "atop", CPU), bundle.inpainter),
        (trained_discriminator(tmp_path, "aid", CPU)[0], bundle.discriminator),
    ]
    for run, shipped in pairs:
        assert run.state_dict().keys() == shipped.state_dict().keys()
        assert all(torch.equal(value, shipped.state_dict()[name]) for name, value in run.state_dict().items())


def test_a_bundle_of_unpacked_runs_is_the_bundle(workshop: Workshop, finished: Workshop) -> None:
    assert unpack(finished.bundle, workshop.runs) == 0
    assert workshop.run("export") == 0
    digests = [content_sha256((folder.bundle / "bundle.json").read_bytes()) for folder in (workshop, finished)]
    assert digests[0] == digests[1]
    provenance = json.loads((workshop.bundle / "bundle.json").read_text())["provenance"]
    assert all(run["summary"]["unpacked_from"] == "colors@1" for run in provenance["runs"].values())


def test_others_build_on_unpacked_runs_once_their_own_are_there(
    workshop: Workshop, finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unpack(finished.bundle, workshop.runs) == 0
    assert workshop.run("finetune-atop", {"name": "another"}) == 2
    assert "run purifier in" in (said := capsys.readouterr().err)
    assert "has no weights: run its command again" in said
    assert workshop.run("pretrain-purifier") == 0
    assert workshop.run("finetune-atop", {"name": "another"}) == 0


def test_of_two_classifiers_the_bundle_has_the_one_that_it_names(finished: Workshop, tmp_path: Path) -> None:
    assert finished.run("train-classifier", {"name": "beside", "epochs": 0.5, "warmup_epochs": 0}) == 0
    without_aid = {"aid_run": None, "aid_presets": None, "auto_presets": None}
    changes = {"name": "two", "classifier_run": "beside", "atop_of_another": True, **without_aid}
    assert finished.run("export", changes) == 0
    two = finished.bundle.parents[1] / "two" / "1"
    assert unpack(two, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atop", "beside", "classifier", "purifier"]
    own, shipped = trained_classifier(tmp_path, "beside", CPU), load_bundle(two).classifier
    assert_same(own.state_dict(), shipped.state_dict())
    with pytest.raises(RunError, match="has no weights"):
        trained_classifier(tmp_path, "classifier", CPU)


@pytest.mark.parametrize("named", [{"classifier": "classifier"}, {"classifier": "nobody"}, "classifier", {}])
def test_a_bundle_that_names_other_networks_is_refused(finished: Workshop, named: object) -> None:
    bundle = load_bundle(finished.bundle)
    bundle.manifest.provenance["networks"] = named
    with pytest.raises(BundleError, match="does not say which runs"):
        last_runs(bundle, told_runs(bundle))
    del bundle.manifest.provenance["networks"]  # as in bundles of an older version
    inferred = {"classifier": "classifier", "inpainter": "atop", "discriminator": "aid"}
    assert last_runs(bundle, told_runs(bundle)) == inferred


def test_its_own_command_cannot_go_on_with_an_unpacked_run(
    workshop: Workshop, finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unpack(finished.bundle, workshop.runs) == 0
    checkpoint = workshop.runs / "classifier" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert workshop.run("train-classifier") == 2
    assert "does not say what it was begun with" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_a_run_without_weights_is_not_finished_once_its_command_began(
    workshop: Workshop, finished: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unpack(finished.bundle, workshop.runs) == 0

    def stop(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr("training.train_purifier.PurifierTraining.summarize", stop)
    with pytest.raises(Interrupted):
        workshop.run("pretrain-purifier")
    monkeypatch.undo()
    capsys.readouterr()
    assert workshop.run("finetune-atop", {"name": "another"}) == 2
    assert "run purifier in" in (said := capsys.readouterr().err)
    assert "is not finished" in said


def test_bundles_that_share_a_record_are_unpacked_side_by_side(
    workshop: Workshop, finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unpack(finished.bundle, workshop.runs) == 0
    assert workshop.run("pretrain-purifier") == 0
    for name in ("classifier", "atop", "aid"):
        shutil.rmtree(workshop.runs / name)
    capsys.readouterr()
    assert unpack(finished.bundle, workshop.runs) == 0
    assert "purifier" not in [Path(line).name for line in capsys.readouterr().out.split()]
    assert read_checkpoint(workshop.runs, "purifier")


def test_a_run_that_is_there_is_kept_and_nothing_is_written(
    finished: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "aid").mkdir()
    assert unpack(finished.bundle, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["aid"]
    with pytest.raises(RunError, match="there is no run classifier"):
        read_checkpoint(tmp_path, "classifier")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.clear(),
        lambda told: told["runs"].clear(),
        lambda told: told["runs"].pop("classifier"),
        lambda told: (told.pop("networks"), told["runs"].update(another=told["runs"]["aid"])),
        lambda told: told.update(runs={"../elsewhere": told["runs"]["aid"]}),
        lambda told: told["runs"]["aid"].pop("summary"),
        lambda told: told.update(runs="none"),
    ],
    ids=["nothing", "no runs", "no classifier", "two of a kind", "a path", "no summary", "a word"],
)
def test_a_bundle_that_does_not_say_its_runs_is_refused(
    spoil: Callable[[dict[str, Any]], object], finished: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "bundle"
    copied.mkdir()
    for path in finished.bundle.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copied / "bundle.json").read_text())
    spoil(manifest["provenance"])
    (copied / "bundle.json").write_text(json.dumps(manifest))
    assert unpack(copied, tmp_path / "runs") == 2
    assert "provenance does not say" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "elsewhere").exists()
