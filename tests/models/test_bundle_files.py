from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models import Bundle, BundleError, check_bundle, load_bundle, save_bundle, write_report
from models.classifiers import build_classifier
from models.manifest import ClassifierSpec, Defenses
from tests.networks import REAL_SIZE as SIZE
from tests.networks import real_bundle, real_manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_bundle(real_bundle(), tmp_path / "tiny" / "1")
    return tmp_path / "tiny" / "1"


def test_a_mirrored_classifier_is_mirrored_again_when_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    manifest = real_manifest().model_copy(
        update={
            "classifier": ClassifierSpec(architecture="wrn-16-2", mirrored=True),
            "defenses": Defenses(),
            "default_defense": "none",
        }
    )
    original = build_classifier("wrn-16-2", num_classes=4, input_size=SIZE, mirrored=True)
    save_bundle(Bundle(manifest, original), tmp_path / "1")
    images = torch.rand(2, 3, SIZE, SIZE)

    loaded = load_bundle(tmp_path / "1")

    torch.testing.assert_close(loaded.classifier(images), loaded.classifier(images.flip(3)))
    torch.testing.assert_close(loaded.classifier(images), original(images), rtol=0.02, atol=0.02)
    torch.testing.assert_close(loaded.probabilities("none", images), loaded.probabilities("none", images.flip(3)))


def test_a_saved_bundle_answers_like_the_one_that_was_saved(saved: Path) -> None:
    original, loaded = real_bundle(), load_bundle(saved)
    images = torch.rand(3, 3, SIZE, SIZE)

    assert loaded.classes == ("a", "b", "c", "d")
    assert loaded.input_size == (SIZE, SIZE)
    assert loaded.default_defense == "atop"
    assert len(loaded.digest) == 64
    for defense in ("none", "atop"):  # weights are stored in half precision
        assert torch.allclose(
            loaded.defended(defense, seed=0)(images), original.defended(defense, seed=0)(images), atol=2e-2
        )
    assert torch.allclose(loaded.aid_score(images), original.aid_score(images), atol=1e-2)


def test_the_weights_on_disk_are_half_precision_safetensors(saved: Path) -> None:
    files = {path.name for path in saved.iterdir()}
    tensors = safetensors.torch.load_file(saved / "classifier.safetensors")

    assert files == {"bundle.json", "classifier.safetensors", "atop.safetensors", "aid.safetensors"}
    assert all(value.dtype == torch.float16 for value in tensors.values() if value.is_floating_point())
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in saved.glob("*.safetensors"))


def test_a_loaded_bundle_is_frozen_and_in_eval_mode(saved: Path) -> None:
    bundle = load_bundle(saved)

    for part in (bundle.classifier, bundle.inpainter, bundle.discriminator):
        assert part is not None
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_a_version_once_written_does_not_change(saved: Path) -> None:
    with pytest.raises(BundleError, match="already holds a bundle"):
        save_bundle(real_bundle(), saved)


def test_a_report_joins_the_bundle_and_its_hashes(saved: Path) -> None:
    before = load_bundle(saved)
    write_report(saved, {"undefended": {"standard": 1}}, "<p>one</p>")
    after = load_bundle(saved)

    assert before.report == {}
    assert after.report == {"undefended": {"standard": 1}}
    assert before.digest != after.digest
    assert (saved / "report.html").read_text() == "<p>one</p>"
    (saved / "report.html").write_text("<p>another</p>")
    with pytest.raises(BundleError, match=r"report\.html"):
        load_bundle(saved)


def test_a_report_changes_nothing_else_of_a_bundle_of_an_older_version(saved: Path) -> None:
    path = saved / "bundle.json"
    older = json.loads(path.read_text())
    del older["defenses"]["zeropur"]["presets"]["code"]["coarse_layers"]
    older["provenance"] = {"by": "Zoë"}
    path.write_text(json.dumps(older))

    write_report(saved, {"accuracy": 0.5}, "<p>0.5")

    now = json.loads(path.read_text())
    assert now.pop("files") == older.pop("files") | {
        name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in ("report.json", "report.html")
    }
    assert now == older
    load_bundle(saved)


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_report_that_is_interrupted_leaves_a_sound_bundle(
    saved: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(saved, {"undefended": {"standard": 1}}, "<p>one</p>")
    replace, left = os.replace, iter(range(moves))

    def replace_or_die(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        write_report(saved, {"undefended": {"standard": 2}}, "<p>two</p>")
    monkeypatch.undo()

    assert load_bundle(saved).report in ({}, {"undefended": {"standard": 1}})
    write_report(saved, {"undefended": {"standard": 2}}, "<p>two</p>")
    assert load_bundle(saved).report == {"undefended": {"standard": 2}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def truncate_and_rehash(bundle: Path) -> None:
    truncate(bundle / "atop.safetensors")
    rehash(bundle, "atop.safetensors")


def rehash(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def change_tensor(bundle: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Alter the classifier's weights and make the hash right again."""
    path = bundle / "classifier.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    rehash(bundle, path.name)


def set_field(bundle: Path, **fields: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, **fields}))


def huge_header(bundle: Path) -> None:
    path = bundle / "aid.safetensors"
    path.write_bytes((10 * 1024**3).to_bytes(8, "little") + b"{}")
    rehash(bundle, path.name)


def bad_report(bundle: Path) -> None:
    (bundle / "report.json").write_text("[1, 2]")
    rehash(bundle, "report.json")


def link_outside(bundle: Path) -> None:
    path = bundle / "aid.safetensors"
    path.rename(bundle.parent / "elsewhere")
    os.symlink(bundle.parent / "elsewhere", path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: (b / "bundle.json").unlink(), "bundle.json: cannot be read"),
        (lambda b: (b / "bundle.json").write_text("{"), "bundle.json: content: Invalid JSON"),
        (lambda b: (b / "bundle.json").write_bytes(b" " * 5_000_000), "bundle.json: larger than"),
        (lambda b: set_field(b, schema_version=2), "bundle.json: schema_version"),
        (lambda b: set_field(b, classifier={"architecture": "magic"}), "bundle.json: unknown architecture 'magic'"),
        (lambda b: set_field(b, classes=["a", "b", "c"]), "classifier.safetensors: stages.head.* is"),
        (lambda b: set_field(b, input_size=[32, 24]), "bundle.json: input_size: .*square"),
        (bad_report, "report.json: not a JSON object"),
        (lambda b: (b / "atop.safetensors").unlink(), "atop.safetensors: missing"),
        (lambda b: truncate(b / "atop.safetensors"), "atop.safetensors: its sha256 is not the one"),
        (truncate_and_rehash, "not a whole safetensors file"),
        (huge_header, "aid.safetensors: not a whole safetensors file"),
        (link_outside, "aid.safetensors: missing, or not a plain file"),
        (lambda b: change_tensor(b, lambda t: t["stages.stem.weight"].fill_(float("nan"))), "not finite"),
        (lambda b: change_tensor(b, lambda t: t.pop("stages.stem.weight")), "tensors missing or unexpected"),
        (
            lambda b: change_tensor(b, lambda t: t.update({"stages.stem.weight": torch.zeros(1)})),
            r"stages.stem.weight is \(1,\), not \(16, 3, 3, 3\)",
        ),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(saved: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(saved)

    with pytest.raises(BundleError, match=reason):
        load_bundle(saved)


class Boom:
    def __reduce__(self) -> tuple[object, ...]:
        return (os._exit, (66,))


def test_a_check_without_loading_gives_the_digest_or_says_which_file_is_not_as_it_was(saved: Path) -> None:
    assert check_bundle(saved) == load_bundle(saved).digest
    truncate(saved / "atop.safetensors")
    with pytest.raises(BundleError, match=r"atop\.safetensors: its sha256"):
        check_bundle(saved)
    (saved / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"bundle\.json: cannot be read"):
        check_bundle(saved)


def test_a_pickle_in_the_place_of_weights_is_never_opened(saved: Path) -> None:
    (saved / "classifier.safetensors").write_bytes(pickle.dumps(Boom()))
    rehash(saved, "classifier.safetensors")

    with pytest.raises(BundleError, match=r"classifier.safetensors: not a whole safetensors file"):
        load_bundle(saved)
