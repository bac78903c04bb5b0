"""Two processes make the steps of one with the double batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.tiny import RECIPES, Workshop, write_recipe
from training.parallel import Group, average, group, joined, train_together

ROOT = Path(__file__).parents[2]
STEPS = 60
"""Of 48 images, 16 at a time."""
CHANGES = {"train-classifier": {"warmup_epochs": 0}}
"""For a single epoch."""
CLASSIFIER = {**RECIPES["train-classifier"], "cutmix": 0.0, "epochs": STEPS // 3}


def train(workshop: Workshop, command: str, fields: dict[str, Any], processes: int) -> subprocess.CompletedProcess[str]:
    recipe = write_recipe(workshop.folder / f"{fields['name']}.toml", fields)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--module", "training"]
    line = [sys.executable, *(start if processes > 1 else ["-m", "training"]), command, "--recipe", str(recipe)]
    line += ["--data", str(workshop.folder / "data"), "--runs", str(workshop.folder / "runs"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def trained(workshop: Workshop, command: str, fields: dict[str, Any], processes: int) -> list[dict[str, float]]:
    done = train(workshop, command, fields, processes)
    assert done.returncode == 0, done.stderr
    lines = (workshop.folder / "runs" / fields["name"] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one_with_the_double_batch(workshop: Workshop) -> None:
    one = trained(workshop, "train-classifier", {**CLASSIFIER, "name": "one", "batch_size": 16}, 1)
    two = trained(workshop, "train-classifier", {**CLASSIFIER, "name": "two", "batch_size": 8}, 2)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [20, 40, 60]
    for alone, together in zip(one, two, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=2e-2)
    half = trained(workshop, "train-classifier", {**CLASSIFIER, "name": "half", "batch_size": 8}, 1)
    assert half[0]["loss"] != pytest.approx(one[0]["loss"], rel=2e-2)
    weights = [
        torch.load(workshop.folder / "runs" / name / "checkpoint.pt", weights_only=True)["state"]["classifier"]
        for name in ("one", "two")
    ]
    means = [name for name in weights[0] if name.endswith("running_mean")]
    assert means
    for name in means:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0.05, atol=0.01)


@pytest.mark.slow
def test_the_first_writes_and_another_number_does_not_go_on(workshop: Workshop) -> None:
    fields = {**CLASSIFIER, "name": "two", "epochs": 2}
    done = train(workshop, "train-classifier", fields, 2)
    summary = json.loads((workshop.folder / "runs" / "two" / "summary.json").read_text())
    assert json.loads(done.stdout) == summary
    assert summary["processes"] == 2
    assert train(workshop, "train-classifier", fields, 2).returncode == 0  # it is finished
    refused = train(workshop, "train-classifier", fields, 1)
    assert refused.returncode == 2
    assert "processes" in refused.stderr


@pytest.mark.slow
def test_every_command_trains_with_two(workshop: Workshop) -> None:
    for command in ("train-classifier", "pretrain-purifier", "finetune-atop", "train-aid"):
        (*_, last) = trained(workshop, command, {**RECIPES[command], "epochs": 1, **CHANGES.get(command, {})}, 2)
        assert last["step"] == 3
        assert all(torch.tensor(value).isfinite() for value in last.values())


def test_alone_nothing_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with joined(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert group() == Group(0, 1)
        train_together([network])
    assert type(network[1]) is nn.BatchNorm2d
    assert average({"loss": 0.1}) == {"loss": 0.1}
    assert Group(0, 1).path == ()


def test_shares_are_the_whole_batch_each_once() -> None:
    batch = torch.arange(7)
    shares = [Group(rank, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat(shares), batch)
    assert len({Group(rank, 3).path for rank in range(3)}) == 3
