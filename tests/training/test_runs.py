from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.tiny import (
    RECIPES,
    Workshop,
    assert_resumes_exactly,
    assert_same_run,
    color_set,
    interrupt,
)
from tests.training.tiny import Interrupted as Killed
from training.config import ClassifierRecipe
from training.data import Batches
from training.provenance import fingerprint
from training.runs import (
    Run,
    RunError,
    Stateful,
    fit,
    read_checkpoint,
    read_recipe_of,
    read_summary_of,
)

ROOT = Path(__file__).parents[2]
ORIGIN = {"data": color_set(12).fingerprint()}
RECIPE = ClassifierRecipe.model_validate(RECIPES["train-classifier"])


class Slope:
    """Fits one weight with momentum: its path depends on all that came before."""

    def __init__(self, steps: int = 8) -> None:
        self.batches = Batches(color_set(12), 4, RECIPE.augmentation, 0, torch.device("cpu"))
        self.steps = steps
        self.weight = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.weight.weight)
        torch.nn.init.zeros_(self.weight.bias)
        self.optimizer = torch.optim.SGD(self.weight.parameters(), lr=0.1, momentum=0.9)

    def state(self) -> Mapping[str, Stateful]:
        return {"weight": self.weight, "optimizer": self.optimizer}

    def step(self, step: int) -> dict[str, float]:
        images, labels = self.batches.at(step)
        loss = (self.weight(images.mean((1, 2, 3))[:, None]).squeeze(1) - labels).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def summarize(self) -> dict[str, float]:
        return {"bias": self.weight.bias.item()}


def metrics_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_recipe_metrics_checkpoint_tensorboard_and_summary(tmp_path: Path) -> None:
    run, task = Run(tmp_path, RECIPE), Slope()

    summary = fit(run, task, checkpoint_every_s=60, log_every=3)

    assert [line["step"] for line in metrics_of(run)] == [3, 6, 8]
    replay = Slope()
    losses = [replay.step(step)["loss"] for step in range(8)]
    assert [line["loss"] for line in metrics_of(run)] == [losses[2], losses[5], losses[7]]
    resolved = read_recipe_of(tmp_path, RECIPE.name)
    assert resolved["lr"] == RECIPE.lr
    assert "source" not in resolved["data"]  # where the data lay is no part of what was done
    assert torch.equal(read_checkpoint(tmp_path, RECIPE.name)["weight"]["bias"], task.weight.bias.detach())
    assert summary == read_summary_of(tmp_path, RECIPE.name)
    assert summary["bias"] == task.weight.bias.item()
    assert summary["data_sha256"] == color_set(12).fingerprint()
    assert summary["classes"] == ["red", "green", "blue"]
    assert summary["wall_s"] > 0
    (session,) = summary["sessions"]
    assert session["libraries"]["torch"] == torch.__version__
    assert session["hardware"]["threads"] == torch.get_num_threads()
    assert list((run.directory / "tensorboard").glob("events.*"))
    assert not list(run.directory.glob("*.unfinished"))


def test_a_run_that_is_stopped_ends_like_one_that_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes_exactly(Slope, RECIPE, tmp_path, monkeypatch)


def test_metrics_that_no_checkpoint_covers_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, RECIPE)
    with pytest.raises(Killed):
        fit(run, interrupt(Slope(), 2, monkeypatch), checkpoint_every_s=1e-9, log_every=1)
    run.log(3, {"loss": 7.0})
    with (run.directory / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "lo')  # the line during which the process was killed

    assert Run(tmp_path, RECIPE).restore(Slope().state(), ORIGIN) == 2

    assert [line["step"] for line in metrics_of(run)] == [1, 2]


def test_tensorboard_tells_each_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, RECIPE)
    with pytest.raises(Killed):
        fit(run, interrupt(Slope(), 5, monkeypatch), checkpoint_every_s=1e-9, log_every=1)
    with pytest.raises(Killed):
        fit(Run(tmp_path, RECIPE), interrupt(Slope(), 7, monkeypatch), checkpoint_every_s=1e9, log_every=1)
    fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60, log_every=1)

    board = EventAccumulator(str(run.directory / "tensorboard"))
    board.Reload()

    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60)
    files = ("metrics.jsonl", "summary.json", "origin.json")
    before = [(tmp_path / RECIPE.name / name).read_bytes() for name in files]
    again = Slope()
    assert fit(Run(tmp_path, RECIPE), again, checkpoint_every_s=60) == json.loads(before[1])
    assert [(tmp_path / RECIPE.name / name).read_bytes() for name in files] == before
    assert torch.equal(read_checkpoint(tmp_path, RECIPE.name)["weight"]["bias"], again.weight.bias.detach())


def test_time_trained_adds_up_over_interruptions(tmp_path: Path) -> None:
    run, state = Run(tmp_path, RECIPE), Slope().state()
    run.restore(state, ORIGIN)
    run.save(1, state, wall_s=1000.0)
    assert fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60)["wall_s"] > 1000


def test_a_checkpoint_that_dies_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, task = Run(tmp_path, RECIPE), Slope()
    run.restore(task.state(), ORIGIN)
    run.save(1, task.state(), wall_s=1.0)
    whole = (run.directory / "checkpoint.pt").read_bytes()

    def half_a_file(content: object, path: Path) -> None:
        path.write_bytes(whole[: len(whole) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half_a_file)
    task.step(1)
    with pytest.raises(OSError, match="no space"):
        run.save(2, task.state(), wall_s=2.0)

    assert (run.directory / "checkpoint.pt").read_bytes() == whole
    assert Run(tmp_path, RECIPE).restore(Slope().state(), ORIGIN) == 1


def test_another_recipe_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, RECIPE).restore({}, {})
    with pytest.raises(RunError, match="belongs to another recipe"):
        Run(tmp_path, RECIPE.model_copy(update={"lr": 0.5}))
    elsewhere = RECIPE.data.model_copy(update={"source": "another/copy"})
    assert Run(tmp_path, RECIPE.model_copy(update={"data": elsewhere})).restore({}, {}) == 0


def test_a_run_that_was_begun_before_a_recipe_had_a_field_goes_on_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / RECIPE.name / "recipe.json"
    Run(tmp_path, RECIPE).restore({}, {})
    whole = path.read_text()
    path.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "label_smoothing"}))

    with pytest.raises(RunError, match="belongs to another recipe"):
        Run(tmp_path, RECIPE.model_copy(update={"label_smoothing": 0.1}))
    Run(tmp_path, RECIPE).restore({}, {})

    assert path.read_text() == whole


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": {}, "surprise": 1}'])
def test_a_directory_whose_recipe_is_none_is_refused(content: str, tmp_path: Path) -> None:
    Run(tmp_path, RECIPE).restore({}, {})
    (tmp_path / RECIPE.name / "recipe.json").write_text(content)
    with pytest.raises(RunError, match="belongs to another recipe"):
        Run(tmp_path, RECIPE)


def test_a_run_goes_on_only_from_what_it_was_begun_with(tmp_path: Path) -> None:
    first, second = ({"weight": torch.tensor([value])} for value in (1.0, 2.0))
    fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60, given={"classifier": first})
    before = (tmp_path / RECIPE.name / "summary.json").read_text()

    with pytest.raises(RunError, match="its classifier is not what it was begun with"):
        fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60, given={"classifier": second})
    other = Slope()
    other.batches = Batches(color_set(12, seed=1), 4, RECIPE.augmentation, 0, torch.device("cpu"))
    with pytest.raises(RunError, match="its data is not what it was begun with"):
        fit(Run(tmp_path, RECIPE), other, checkpoint_every_s=60, given={"classifier": first})

    assert (tmp_path / RECIPE.name / "summary.json").read_text() == before
    assert json.loads(before)["classifier_sha256"] == fingerprint(first)


def test_whoever_goes_on_with_a_run_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in ("first", "second", "second"):
        monkeypatch.setattr("training.runs.git_commit", lambda commit=commit: commit)
        with pytest.raises(Killed):
            fit(Run(tmp_path, RECIPE), interrupt(Slope(), 2, monkeypatch), checkpoint_every_s=1e9)

    summary = fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60)

    assert [session["git_commit"] for session in summary["sessions"]] == ["first", "second"]


def test_a_checkpoint_whose_origin_is_lost_is_refused(tmp_path: Path) -> None:
    fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60)
    (tmp_path / RECIPE.name / "origin.json").unlink()
    with pytest.raises(RunError, match="does not say what it was begun with"):
        fit(Run(tmp_path, RECIPE), Slope(), checkpoint_every_s=60)


def test_opening_a_run_writes_nothing(tmp_path: Path) -> None:
    Run(tmp_path / "runs", RECIPE)
    assert not (tmp_path / "runs").exists()


def test_runs_that_are_missing_or_not_finished_are_refused(tmp_path: Path) -> None:
    for read in (read_recipe_of, read_checkpoint):
        with pytest.raises(RunError, match="there is no run classifier"):
            read(tmp_path, "classifier")
    run = Run(tmp_path, RECIPE)
    run.restore({}, {})
    run.save(1, {}, wall_s=1.0)
    for read in (read_summary_of, read_checkpoint):
        with pytest.raises(RunError, match=r"classifier in .* is not finished"):
            read(tmp_path, "classifier")


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_run_goes_on_as_if_nothing_had_been(workshop: Workshop) -> None:
    changes = {"epochs": 12, "checkpoint_every_s": 0.05}
    whole = process(workshop, changes, "whole")
    assert whole.wait() == 0

    killed, directory = process(workshop, changes, "killed"), workshop.folder / "killed" / "classifier"
    while not (directory / "checkpoint.pt").exists():
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (directory / "summary.json").exists()
    assert process(workshop, changes, "killed").wait() == 0

    assert_same_run(workshop.folder / "whole" / "classifier", directory)


def process(workshop: Workshop, changes: Mapping[str, object], runs: str) -> subprocess.Popen[bytes]:
    """A training process; one thread, so that sums are added in the same order."""
    line = workshop.arguments("train-classifier", changes)
    line[line.index("--runs") + 1] = str(workshop.folder / runs)
    command = [sys.executable, "-m", "training", *line]
    with (workshop.folder / f"{runs}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
