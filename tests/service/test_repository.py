"""What is on disk, what is loaded, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import UnknownModel
from service.repository import Catalog, load_repository, renew_repository, warm_bundles
from tests.service.fakes import FakeBundle
from tests.service.manifests import fake_manifest


def place(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def load(path: Path) -> FakeBundle:
    """What `load_bundle` does, with refusals by the directory's name."""
    if path.name == "13":
        raise ValueError("the sha256 of weights.safetensors is wrong\nand more")
    if path.name == "14":
        raise PermissionError(13, "denied", str(path))
    version = "99" if path.name == "15" else path.name
    return FakeBundle(fake_manifest(path.parent.name, version))


def test_sound_bundles_load_and_the_others_are_refused_by_name(tmp_path: Path) -> None:
    place(tmp_path, "a/1", "a/2", "b/1", "a/13", "a/14", "a/15")
    bundles, refused = load_repository(tmp_path, load, max_image_pixels=64)
    assert sorted(bundles) == ["a@1", "a@2", "b@1"]
    assert {refusal.bundle: refusal.reason for refusal in refused} == {
        "a/13": "the sha256 of weights.safetensors is wrong",
        "a/14": "it cannot be read",
        "a/15": "it says it is a 99",
    }


def test_a_bundle_larger_than_the_pixel_limit_is_refused(tmp_path: Path) -> None:
    bundles, refused = load_repository(place(tmp_path, "a/1"), load, max_image_pixels=63)
    assert not bundles
    assert "CLARIFIER_MAX_IMAGE_PIXELS" in refused[0].reason


def test_row_64_pickles_are_warned_about_and_never_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(tmp_path, "a/1")
    pickle = tmp_path / "a" / "1" / "model.pt"
    pickle.write_bytes(b"not a pickle")
    pickle.chmod(0)
    bundles, refused = load_repository(tmp_path, load, max_image_pixels=64)
    assert list(bundles) == ["a@1"]
    assert not refused
    assert "model.pt is ignored" in caplog.text


def test_a_repository_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert load_repository(tmp_path / "none", load, max_image_pixels=64) == ({}, [])


def catalog(*names: str) -> Catalog:
    split = [name.split("@") for name in names]
    return Catalog({f"{name}@{version}": FakeBundle(fake_manifest(name, version)) for name, version in split})


def test_a_name_finds_its_newest_version_by_number() -> None:
    models = catalog("a@9", "a@10", "b@1")
    assert models.find("a")[0] == "a@10"
    assert models.find("a@9")[0] == "a@9"
    assert models.find("b")[0] == "b@1"


@pytest.mark.parametrize("name", ["", "c", "a@3", "a@", "@1", "a@10@1", "A"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownModel):
        catalog("a@9", "a@10").find(name)


def test_descriptions_hold_what_a_client_chooses_by() -> None:
    models = catalog("b@1", "a@10", "a@9")
    assert [(info.name, info.version) for info in models.describe_all()] == [("a", "9"), ("a", "10"), ("b", "1")]
    assert [info.version for info in models.describe("a")] == ["9", "10"]
    (info,) = models.describe("a@9")
    assert info.classes == ["red", "green", "blue"]
    assert info.input_size == (8, 8)
    assert info.default_defense == "atop"
    assert info.defenses["atop"].presets["rt3"]["transform"] == "rt3"
    assert info.aid_threshold == 0.5
    assert info.report == {"undefended": {"standard": {"accuracy": 1.0}}}
    assert len(info.digest) == 64


def test_a_renewal_takes_what_is_unchanged_or_spoiled_from_before_and_warms_the_rest(tmp_path: Path) -> None:
    place(tmp_path, "a/1", "a/2", "a/13", "a/16", "b/1")
    names = ["a@1", "a@2", "a@13", "a@16", "b@9"]
    before = {name: FakeBundle(fake_manifest(*name.split("@"))) for name in names}
    warmed = list[str]()

    def warm(name: str, _: FakeBundle) -> None:
        warmed.append(name)
        if name == "a@16":
            raise RuntimeError("it does not fit")

    def check(path: Path) -> str:
        return ("d" if path.name == "1" else "c") * 64

    bundles, refused = renew_repository(tmp_path, load, check, warm, 64, before)
    assert sorted(bundles) == ["a@1", "a@13", "a@16", "a@2", "b@1"]
    assert [name for name in names if bundles.get(name) is before[name]] == ["a@1", "a@13", "a@16"]
    assert warmed == ["a@16", "a@2", "b@1"]
    assert [refusal.bundle for refusal in refused] == ["a/13", "a/16"]


def test_a_bundle_that_cannot_run_is_refused_and_the_others_serve() -> None:
    bundles = {"a@1": FakeBundle(), "b@2": FakeBundle(), "c@1": FakeBundle()}

    def warm(name: str, bundle: FakeBundle) -> None:
        if name == "b@2":
            raise RuntimeError("/secret/path: mat1 and mat2 shapes cannot be multiplied")

    sound, refused = warm_bundles(bundles, warm)
    assert list(sound) == ["a@1", "c@1"]
    assert [(refusal.bundle, refusal.reason) for refusal in refused] == [("b/2", "it failed when it was first run")]
