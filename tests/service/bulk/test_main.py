"""The command as its users run it: with a Ray of its own, killed, and started again."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models import load_bundle
from service.bulk import __main__ as command
from service.bulk.__main__ import main
from service.bulk.places import BulkError
from service.bulk.stages import image_seed
from service.images import decode_image
from tests.service.bulk.conftest import write_cifar

ROOT = Path(__file__).parents[3]
ROWS, BATCH = 120, 2
PATIENCE_S = 600
"""For what takes seconds where nothing else runs."""


def start(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.bulk", *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object) -> tuple[int, str, str]:
    """The exit status, the summary, and what was said on the way."""
    with start(*arguments) as process:
        try:
            out, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    return process.returncode, out, said


def summary(out: str) -> dict[str, str]:
    return {name: rest.split()[0] for name, rest in (line.split(None, 1) for line in out.splitlines())}


def results(target: Path, key: str = "path") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(target / "results").to_pylist()
    return sorted(rows, key=lambda row: row[key])


@pytest.mark.slow
def test_a_folder_is_classified_and_a_bad_image_fails_alone(photos: Path, tmp_path: Path, repository: Path) -> None:
    arguments = [photos, tmp_path / "target", "--model", "tiny", "--repository", repository, "--seed", 3]
    status, out, said = run(*arguments)
    assert status == 0, said
    assert "Traceback" not in said
    assert (summary(out)["images"], summary(out)["failed"], summary(out)["resumed"]) == ("6", "2", "0")
    rows = results(tmp_path / "target")
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert errors == {"bad.png": "unsupported_format", "empty.webp": "empty_body"}

    bundle = load_bundle(repository / "tiny" / "1")
    good = [row for row in rows if not row["error"]]
    assert [row["path"] for row in good] == ["a.png", "b.jpg", "more/a.PNG", "more/c.bmp"]
    for row in good:
        pixels = decode_image((photos / row["path"]).read_bytes(), bundle.input_size, 10**6).pixels
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
        assert row["seed"] == image_seed(3, row["path"])
        expected = bundle.probabilities("atop", image, seed=[row["seed"]])[0]
        assert row["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
        assert row["label"] == bundle.classes[row["index"]]
        assert sorted(verdict["index"] for verdict in row["top"]) == [0, 1, 2, 3]

    assert main([*map(str, arguments), "--strict"]) == 1  # nothing is left to do, but what failed


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_as_one_that_was_not(tmp_path: Path, repository: Path) -> None:
    write_cifar(tmp_path / "test.parquet", ROWS)
    asked = ["--operation", "purify", "--model", "tiny", "--repository", repository]
    asked += ["--seed", 5, "--batch-size", BATCH]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with start(tmp_path / "test.parquet", killed, *asked) as process:
        try:
            wait_for_parts(process, killed)
            strangers = open_to_strangers(process)
        finally:
            process.kill()
        process.communicate()
    left = list((killed / "results").glob("part-*.parquet"))
    assert 0 < len(left) < ROWS / BATCH
    assert not strangers

    status, out, said = run(tmp_path / "test.parquet", killed, *asked)
    assert status == 0, said
    assert "only what is missing is done" in said
    assert summary(out)["images"] == str(ROWS)
    assert int(summary(out)["resumed"]) >= BATCH * len(left)
    assert run(tmp_path / "test.parquet", whole, *asked)[0] == 0

    resumed, uninterrupted = results(killed, "row"), results(whole, "row")
    assert [row["row"] for row in resumed] == list(range(ROWS))
    assert resumed == uninterrupted
    assert len({row["img"]["bytes"] for row in resumed}) == ROWS


def wait_for_parts(process: subprocess.Popen[str], target: Path) -> None:
    """Until the first results are there."""
    deadline = time.monotonic() + PATIENCE_S
    while not list(target.glob("results/part-*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def open_to_strangers(process: subprocess.Popen[str]) -> list[str]:
    """Addresses that a run listens on, and others can reach."""
    found = set()
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            connections = each.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    assert found
    return sorted(ip for ip in found if not is_loopback(ip))


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


@pytest.mark.slow
def test_a_folder_is_purified_into_files_of_its_names(photos: Path, tmp_path: Path, repository: Path) -> None:
    source, target = f"file://{photos}", f"file://{tmp_path}/target"
    status, _, said = run(source, target, "--operation", "purify", "--model", "tiny", "--repository", repository)
    assert status == 0, said
    images = tmp_path / "target" / "images"
    found = sorted(str(path.relative_to(images)) for path in images.rglob("*") if path.is_file())
    assert found == ["a.png", "b.jpg.png", "more/a.PNG", "more/c.bmp.png"]
    bundle = load_bundle(repository / "tiny" / "1")
    first = results(tmp_path / "target")[0]
    pixels = decode_image((photos / "a.png").read_bytes(), bundle.input_size, 10**6).pixels
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    purified = bundle.purify("atop", image, seed=[first["seed"]])[0].permute(1, 2, 0).numpy()
    assert first["file"] == "images/a.png"
    assert first["linf"] == pytest.approx(float(np.abs(purified - pixels / 255).max()), abs=1e-4)
    written = np.asarray(Image.open(images / "a.png")).astype(float)
    assert np.abs(written - 255 * purified).max() < 0.6


def test_wrong_arguments_are_refused_in_one_line(
    photos: Path, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(photos), str(tmp_path / "target"), "--repository", str(repository), "--model", "tiny"]
    assert main([*asked, "--defense", "magic"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--defense: model tiny offers the defenses none, atop, aid, zeropur"
    ]
    for wrong in (["--batch-size", "0"], ["--operation", "detect"], ["--nosuch"]):
        with pytest.raises(SystemExit, match="2"):
            main([*asked, *wrong])


def test_a_setting_that_is_wrong_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLARIFIER_MAX_IMAGE_PIXEL", "7")
    assert main([str(photos), str(tmp_path / "target")]) == 2
    assert "CLARIFIER_MAX_IMAGE_PIXEL is not a setting" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main([str(tmp_path), str(tmp_path / "target")]) == 2
    assert "pip install 'clarifier[service,bulk]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("Traceback\n  ...\nEngineFault: cuda\n"), 70, "the run failed: EngineFault: cuda"),
        (BulkError("--device: it is cuda, but Ray sees no GPU"), 2, "--device: it is cuda"),
        (command.Stopped(15), 143, "stopped; the same command goes on"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    ],
)
def test_how_it_ends_is_said(
    error: BaseException,
    status: int,
    said: str,
    photos: Path,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "_work_off", fail)
    assert main([str(photos), str(tmp_path / "t"), "--repository", str(repository), "--model", "tiny"]) == status
    assert said in capsys.readouterr().err
