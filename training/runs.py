"""A run directory and the one loop that fills it: resolved recipe, metrics, TensorBoard, a checkpoint.

A run may be killed at any moment. Whatever a step draws is derived from the recipe's seed and the step's
number, a checkpoint replaces its predecessor in one move, and metrics written after the last checkpoint are
dropped on resumption: the resumed run is the run that would have been.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from models.files import replace_text
from training.config import Recipe
from training.data import Batches
from training.parallel import average, group, train_together, wait_for_all
from training.provenance import fingerprint, git_commit, hardware, library_versions

Checkpoint = dict[str, dict[str, Any]]
"""The states that a checkpoint holds, by name."""


class RunError(ValueError):
    """A run directory that cannot be used; the message names it."""


class Stateful(Protocol):
    """Anything that a checkpoint holds: modules, optimizers, averages, scalers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Task(Protocol):
    """What the loop runs: `step(n)` makes update n and returns what to log, `summarize` looks at the result."""

    batches: Batches
    steps: int

    def state(self) -> Mapping[str, Stateful]: ...

    def step(self, step: int) -> dict[str, float]: ...

    def summarize(self) -> dict[str, float]: ...


class Run:
    """A run directory `<runs>/<recipe.name>`, open for writing."""

    def __init__(self, runs: Path, recipe: Recipe) -> None:
        """Nothing is written yet; raises RunError if the directory belongs to another recipe."""
        self.directory = runs / recipe.name
        self.wall_s = 0.0
        self._checkpoint = self.directory / "checkpoint.pt"
        self._metrics = self.directory / "metrics.jsonl"
        self._recipe = self.directory / "recipe.json"
        self._origin = self.directory / "origin.json"
        self._resolved = resolved(recipe)
        self._writes = group().is_first
        if self._recipe.exists() and self._begun_recipe(recipe) != self._resolved:
            raise RunError(f"{self.directory} belongs to another recipe; remove it or name this run differently")

    def _begun_recipe(self, recipe: Recipe) -> str | None:
        """The directory's recipe, resolved today: fields that came later have their defaults. None if it is none."""
        try:
            begun = json.loads(self._recipe.read_text())
            begun["data"]["source"] = recipe.data.source
            return resolved(type(recipe).model_validate(begun))
        except (ValueError, KeyError, TypeError):
            return None

    def restore(self, state: Mapping[str, Stateful], origin: Mapping[str, str]) -> int:
        """Create the directory, or load its checkpoint into `state`; returns the number of steps that had made.

        `origin` has the sha256 of the data and of the networks of earlier runs. Raises RunError if the run was begun
        from others, or came out of a bundle.
        """
        if self._checkpoint.exists() and not self._origin.exists():
            raise RunError(
                f"{self.directory} does not say what it was begun with, so nothing can go on with it: remove it"
            )
        begun = self._read_origin()
        if not self._writes:
            return self._load(state)
        if begun["sha256"] != origin and self._origin.exists():
            differing = sorted(name for name, _ in begun["sha256"].items() ^ origin.items())
            raise RunError(f"{self.directory}: its {differing[0]} is not what it was begun with: remove it")
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_text(self._recipe, self._resolved)
        replace_text(self._origin, json.dumps({**begun, "sha256": origin}, indent=2) + "\n")
        if not self._checkpoint.exists():
            (self.directory / "summary.json").unlink(missing_ok=True)  # of an unpacked run without its weights
        step = self._load(state)
        self._drop_metrics_after(step)
        return step

    def _load(self, state: Mapping[str, Stateful]) -> int:
        if not self._checkpoint.exists():
            return 0
        saved = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        self.wall_s = float(saved["wall_s"])
        for name, holder in state.items():
            holder.load_state_dict(saved["state"][name])
        return int(saved["step"])

    def note_session(self) -> list[dict[str, Any]]:
        """Remember that this code, on this machine, goes on with the run; returns all that did, in turn."""
        origin = self._read_origin()
        session = {"git_commit": git_commit(), "libraries": library_versions(), "hardware": hardware()}
        if session not in origin["sessions"]:
            origin["sessions"].append(session)
            replace_text(self._origin, json.dumps(origin, indent=2) + "\n")
        sessions: list[dict[str, Any]] = origin["sessions"]
        return sessions

    def _read_origin(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"sha256": {}, "sessions": []}
        return json.loads(self._origin.read_text()) if self._origin.exists() else nothing

    def save(self, step: int, state: Mapping[str, Stateful], wall_s: float) -> None:
        """Replace the checkpoint, so that there is always a whole one. `wall_s` is the time trained so far."""
        unfinished = self._checkpoint.with_suffix(".unfinished")
        states = {name: holder.state_dict() for name, holder in state.items()}
        torch.save({"step": step, "wall_s": wall_s, "state": states}, unfinished)
        os.replace(unfinished, self._checkpoint)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with self._metrics.open("a") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")

    def _drop_metrics_after(self, step: int) -> None:
        if self._metrics.exists():
            lines = self._metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            replace_text(self._metrics, "".join(kept))


def resolved(recipe: Recipe) -> str:
    """A recipe with every default spelt out, without where its data lie: two runs are alike when it is equal."""
    return recipe.model_dump_json(indent=2, exclude={"data": {"source"}}) + "\n"


def fit(
    run: Run,
    task: Task,
    *,
    checkpoint_every_s: float,
    log_every: int = 20,
    given: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Run the task to its last step, from wherever the run's checkpoint left off; returns its summary.

    Metrics are logged every `log_every` steps, a checkpoint is saved every `checkpoint_every_s` seconds, and both
    after the last step, by the first of the processes that train together; the others return nothing. `given` names
    the networks of earlier runs that the task builds on, as their weights were when it got them. Raises RunError if the
    run was begun with other ones, with other data, or by another number of processes. A finished run is left as it is.
    """
    state = task.state()
    origin = {"data": task.batches.data.fingerprint()}
    origin |= {name: fingerprint(weights) for name, weights in (given or {}).items()}
    if group().size > 1:
        if len(task.batches.data) < task.batches.together:
            raise RunError(f"{group().size} processes need {task.batches.together} images, a batch for each")
        origin["processes"] = str(group().size)  # another number would make other steps
    start = run.restore(state, origin) if group().is_first else 0
    wait_for_all()
    if not group().is_first:
        start = run.restore(state, origin)
    train_together(state.values())
    if start == task.steps and (finished := run.directory / "summary.json").exists():
        summary: dict[str, Any] = json.loads(finished.read_text())
        return summary
    if not group().is_first:
        _assist(task, start, log_every)
        return {}
    sessions = run.note_session()
    began = saved_at = time.monotonic()
    with (
        SummaryWriter(str(run.directory / "tensorboard"), purge_step=start + 1) as board,
        tqdm(total=task.steps, initial=start, desc=run.directory.name, unit="step") as bar,
    ):
        for done in range(start + 1, task.steps + 1):
            metrics = task.step(done - 1)
            bar.update()
            if done % log_every == 0 or done == task.steps:
                metrics = average(metrics)
                run.log(done, metrics)
                bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
                for name, value in metrics.items():
                    board.add_scalar(name, value, done)
            if done == task.steps or time.monotonic() - saved_at > checkpoint_every_s:
                board.flush()  # what the checkpoint covers, and nothing later, is there after a kill
                run.save(done, state, run.wall_s + time.monotonic() - began)
                saved_at = time.monotonic()
    summary = {
        **task.summarize(),
        "steps": task.steps,
        "classes": list(task.batches.data.classes),
        "processes": int(origin.pop("processes", "1")),
        **{f"{name}_sha256": sha256 for name, sha256 in origin.items()},
        "wall_s": run.wall_s + time.monotonic() - began,
        "sessions": sessions,
    }
    replace_text(run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _assist(task: Task, start: int, log_every: int) -> None:
    """The same steps, of which the first process writes what all have measured."""
    for done in range(start + 1, task.steps + 1):
        metrics = task.step(done - 1)
        if done % log_every == 0 or done == task.steps:
            average(metrics)


def write_finished(
    directory: Path, recipe: Mapping[str, Any], summary: Mapping[str, Any], state: Checkpoint | None
) -> None:
    """A run directory that is nothing but a result: others build on it, its own command cannot go on with it.

    Without `state` it is nothing but a record, until its own command has been run again.
    """
    directory.mkdir(parents=True)
    replace_text(directory / "recipe.json", json.dumps(recipe, indent=2) + "\n")
    if state is not None:
        torch.save({"state": state}, directory / "checkpoint.pt")
    replace_text(directory / "summary.json", json.dumps(summary, indent=2) + "\n")


def read_checkpoint(runs: Path, name: str) -> Checkpoint:
    """The state of a finished run's last checkpoint; raises RunError if the run is missing, not finished or without."""
    read_recipe_of(runs, name)
    read_summary_of(runs, name)
    checkpoint = runs / name / "checkpoint.pt"
    if not checkpoint.exists():
        raise RunError(f"run {name} in {runs} has no weights: run its command again")
    state: Checkpoint = torch.load(checkpoint, weights_only=True, map_location="cpu")["state"]
    return state


def read_recipe_of(runs: Path, name: str) -> dict[str, Any]:
    """The resolved recipe of a run; raises RunError if there is none."""
    path = runs / name / "recipe.json"
    if not path.exists():
        raise RunError(f"there is no run {name} in {runs}: train it first")
    recipe: dict[str, Any] = json.loads(path.read_text())
    return recipe


def read_summary_of(runs: Path, name: str) -> dict[str, Any]:
    """What a finished run says of itself; raises RunError if it is missing or not finished."""
    path = runs / name / "summary.json"
    if not path.exists():
        raise RunError(f"run {name} in {runs} is not finished: run its command again to go on")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary
