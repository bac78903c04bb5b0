from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.provenance import cpu_model, fingerprint, git_commit, hardware, library_versions


def fake_git(folder: Path, script: str) -> None:
    git = folder / "git"
    git.write_text(f"#!/bin/sh\n{script}\n")
    git.chmod(0o755)


def test_equal_networks_have_one_fingerprint_and_others_another() -> None:
    network = torch.nn.Conv2d(3, 4, 3)
    before = fingerprint(network.state_dict())

    assert fingerprint(network.to(memory_format=torch.channels_last).state_dict()) == before  # type: ignore[call-overload]
    with torch.no_grad():
        network.weight[0, 0, 0, 0] += 1
    assert fingerprint(network.state_dict()) != before


def test_the_commit_is_what_git_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path, 'case "$*" in *--always*--dirty=+changes*) echo 0123abcd+changes;; esac')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == "0123abcd+changes"


def test_the_commit_is_that_of_the_code_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path, "pwd")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert git_commit() == str(Path(__file__).parents[2] / "training")


def test_the_commit_is_unknown_outside_a_repository_and_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == "unknown"
    fake_git(tmp_path, "echo fatal >&2; exit 128")
    assert git_commit() == "unknown"


def test_the_libraries_are_those_that_run() -> None:
    versions = library_versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"numpy", "foolbox", "datasets"} <= versions.keys()


def test_the_machine_says_what_it_computes_with() -> None:
    machine = hardware()
    assert machine["cpu"] == cpu_model() != ""
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["gpu"] is None) == (not torch.cuda.is_available())
