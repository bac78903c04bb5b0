"""Of what looked unnatural a sample is kept, for whoever has the private key, and not for ever."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
from PIL import Image

from service.errors import Overloaded
from service.images import to_floats
from service.settings import Settings, SettingsError
from service.watch import evidence
from service.watch.evidence import check_evidence, sweep
from tests.service.conftest import Running, until
from tests.service.fakes import dark, green, png
from tests.service.oip.test_routes import INFER

IDENTITY = pyrage.x25519.Identity.generate()
RECIPIENT = str(IDENTITY.to_public())


@pytest.fixture
def keep(start: Callable[..., Running], tmp_path: Path) -> Callable[..., Running]:
    """Start a server that keeps all evidence in `tmp_path`."""
    whole: dict[str, Any] = {"evidence_dir": tmp_path, "evidence_recipient": RECIPIENT, "evidence_rate": 1.0}
    return lambda **settings: start(**whole | settings)


def kept(folder: Path) -> list[zipfile.ZipFile]:
    """What is in the folder, oldest first."""
    files = sorted(folder.glob("*.zip.age"), key=lambda path: path.stat().st_mtime_ns)
    return [zipfile.ZipFile(io.BytesIO(pyrage.decrypt(file.read_bytes(), [IDENTITY]))) for file in files]


def picture(archive: zipfile.ZipFile, name: str) -> Any:
    return np.asarray(Image.open(archive.open(name)))


def outcomes(server: Running, outcome: str) -> float:
    return server.metric("clarifier_evidence_total", outcome=outcome)


def noted(server: Running, cases: int) -> bool:
    return outcomes(server, "kept") + outcomes(server, "skipped") == cases


def test_a_suspicious_image_is_kept_with_what_the_defense_made_of_it(
    keep: Callable[..., Running], tmp_path: Path
) -> None:
    server = keep()
    query = "defense=aid&explain=true&seed=5"
    answer = server.client.post(f"/classify?{query}", content=png(dark())).json()
    assert answer["suspicious"]
    until(lambda: outcomes(server, "kept") == 1)
    (archive,) = kept(tmp_path)
    case = json.loads(archive.read("case.json"))
    assert case["request_id"] == answer["request_id"]
    assert (case["model"], case["digest"], case["defense"]) == ("colors@1", answer["digest"], "aid")
    assert (case["seed"], case["votes"], case["operation"], case["key"]) == (5, 1, "classify", "")
    assert case["aid_score"] == pytest.approx(answer["aid_score"], abs=1e-3)
    np.testing.assert_array_equal(picture(archive, "input.png"), dark())
    np.testing.assert_array_equal(picture(archive, "purified.png"), dark()[::-1])


def test_a_random_defense_is_repeated_with_its_seed(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep(shadow_rate=1.0)
    purified = server.client.post("/purify?defense=atop", content=png(dark()))
    until(lambda: outcomes(server, "kept") == 1)
    (archive,) = kept(tmp_path)
    assert str(json.loads(archive.read("case.json"))["seed"]) == purified.headers["x-clarifier-seed"]
    np.testing.assert_array_equal(
        picture(archive, "purified.png"), np.asarray(Image.open(io.BytesIO(purified.content)))
    )


def test_numbers_are_kept_as_they_came(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep(shadow_rate=1.0)
    image = to_floats(dark()) + np.float32(0.001)
    tensor = image.transpose(2, 0, 1)[None]
    inputs = [{"name": "images", "shape": tensor.shape, "datatype": "FP32", "data": tensor.ravel().tolist()}]
    assert server.client.post(INFER, json={"inputs": inputs}).status_code == 200
    until(lambda: outcomes(server, "kept") == 1)
    (archive,) = kept(tmp_path)
    np.testing.assert_array_equal(np.load(archive.open("input.npy")), image)


def test_what_was_only_scored_has_no_purified_image(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep()
    assert server.client.post("/detect", content=png(dark())).json()["suspicious"]
    until(lambda: outcomes(server, "kept") == 1)
    (archive,) = kept(tmp_path)
    assert archive.namelist() == ["case.json", "input.png"]


def test_natural_images_are_nobodys_business(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep()
    assert not server.client.post("/detect", content=png(np.full_like(green(), 250))).json()["suspicious"]
    assert server.client.post("/detect", content=png(dark())).json()["suspicious"]
    until(lambda: outcomes(server, "kept") == 1)
    assert len(kept(tmp_path)) == 1


def test_the_rate_is_a_share(keep: Callable[..., Running]) -> None:
    server = keep(evidence_rate=0.25)
    for _ in range(200):
        server.client.post("/detect", content=png(dark()))
    until(lambda: outcomes(server, "kept") >= 20)
    assert outcomes(server, "kept") <= 85


def test_a_file_is_for_its_owner_and_no_pixel_is_in_it_readable(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep()
    server.client.post("/detect", content=png(dark()))
    until(lambda: outcomes(server, "kept") == 1)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes().startswith(b"age-encryption.org/v1\n")
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(file.read_bytes(), [pyrage.x25519.Identity.generate()])


@pytest.mark.skipif(shutil.which("age") is None, reason="age is not installed (on Debian: apt install age)")
def test_the_command_age_opens_it(keep: Callable[..., Running], tmp_path: Path) -> None:
    server = keep()
    server.client.post("/detect", content=png(dark()))
    until(lambda: outcomes(server, "kept") == 1)
    (file,) = tmp_path.iterdir()
    line = ["age", "--decrypt", "--identity", "-", str(file)]
    done = subprocess.run(line, input=str(IDENTITY).encode(), capture_output=True, check=True)
    assert "input.png" in zipfile.ZipFile(io.BytesIO(done.stdout)).namelist()


def test_old_evidence_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    names = ["20260101T000000Z-0123456789abcdef.zip.age", ".20260101T000000Z-0123456789abcdef.zip.age", "notes.zip.age"]
    young = "20260102T000000Z-0123456789abcdef.zip.age"
    for name in [*names, young]:
        (tmp_path / name).write_bytes(b"")
    for name in names:
        os.utime(tmp_path / name, (0, time.time() - 86_400 * 2))
    assert sweep(tmp_path, days=3) == 3
    assert sweep(tmp_path, days=1) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"notes.zip.age", young}


def test_a_server_sweeps_by_itself(
    keep: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "SWEEP_S", 0.05)
    server = keep(evidence_days=1.0)
    server.client.post("/detect", content=png(dark()))
    until(lambda: outcomes(server, "kept") == 1)
    (file,) = tmp_path.iterdir()
    os.utime(file, (0, time.time() - 2 * 86_400))
    until(lambda: not list(tmp_path.iterdir()))


def test_whoever_attacks_cannot_fill_the_disk(
    keep: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "MAX_FILES", 2)
    server = keep()
    for number in range(1, 4):
        server.client.post("/detect", content=png(dark()))
        until(partial(noted, server, number))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_fails_is_counted_and_requests_go_on(
    keep: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = keep()
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    server.client.post("/detect", content=png(dark()))
    until(lambda: outcomes(server, "failed") == 1)
    assert not list(tmp_path.iterdir())
    assert server.still_answers()


def test_without_a_place_in_the_queue_the_input_is_kept_alone(
    keep: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def refuse(*_: object) -> None:
        raise Overloaded

    monkeypatch.setattr(evidence, "run_again", refuse)
    server = keep()
    server.client.post("/classify?defense=aid&explain=true", content=png(dark()))
    until(lambda: outcomes(server, "kept") == 1)
    (archive,) = kept(tmp_path)
    assert archive.namelist() == ["case.json", "input.png"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"evidence_dir": ".", "evidence_recipient": "age1nobody"}, "CLARIFIER_EVIDENCE_RECIPIENT"),
        ({"evidence_dir": "nowhere", "evidence_recipient": RECIPIENT}, "CLARIFIER_EVIDENCE_DIR"),
        ({"evidence_dir": ".", "evidence_recipient": str(IDENTITY)}, "CLARIFIER_EVIDENCE_RECIPIENT"),
    ],
)
def test_what_cannot_be_kept_stops_the_start(settings: dict[str, str], word: str) -> None:
    with pytest.raises(SettingsError, match=word) as stopped:
        check_evidence(Settings(**settings))  # type: ignore[arg-type]
    assert str(IDENTITY) not in str(stopped.value)


@pytest.mark.parametrize("alone", [{"evidence_dir": "."}, {"evidence_recipient": RECIPIENT}])
def test_a_folder_without_a_key_is_a_contradiction(alone: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="need each other"):
        Settings(**alone)  # type: ignore[arg-type]
