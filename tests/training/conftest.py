from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

from tests.training.tiny import Workshop, colors, write_parquet


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library for data sets stays off the network, and keeps its cache in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_HUB_OFFLINE", "1")  # for the processes that tests start
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts with the same global seed and leaves the one it found."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection in this test fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A folder with data of its own, and nothing trained yet."""
    return new_workshop(Workshop(tmp_path))


def new_workshop(workshop: Workshop) -> Workshop:
    write_parquet(workshop.folder / "data", "train", *colors(48))
    write_parquet(workshop.folder / "data", "test", *colors(24, seed=1))
    return workshop


@pytest.fixture(scope="session")
def finished(offline: None, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A folder in which all runs are finished and the bundle is exported and evaluated; not to be changed."""
    with torch.random.fork_rng():
        workshop = new_workshop(Workshop(tmp_path_factory.mktemp("finished")))
        for command in ("train-classifier", "pretrain-purifier", "finetune-atop", "train-aid", "export", "evaluate"):
            assert workshop.run(command) == 0
    return workshop
