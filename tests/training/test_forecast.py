from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from models import load_bundle
from tests.training.evaluations import evaluation_of
from tests.training.tiny import Workshop, color_set
from training import credibility
from training.budgets import Effort
from training.evaluate import measure
from training.evaluation import Evaluation
from training.forecast import UnitTimes, forecast, unit_times
from training.subject import Subject


def test_the_forecast_has_every_defense_and_level_and_a_sum(finished: Workshop, tmp_path: Path) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path)
    lines = forecast(evaluation, evaluation.subjects()).splitlines()
    assert lines[0].split()[-9:] == ["L0", "L1", "L2", "L3", "L4", "L5", "L6", "checks", "all"]
    assert [line.split()[0] for line in lines[1:-1]] == ["none", "atop", "atop:rt3", "aid", "zeropur"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith("In all about ")


def test_the_first_pass_of_a_process_is_not_forecast(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = [0.0], set[str]()

    def spend(what: str, images: Tensor) -> Tensor:
        clock[0] += len(images) if what in seen else 100.0
        seen.add(what)
        return images

    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path)
    monkeypatch.setattr("training.forecast.through", lambda *_, **__: lambda images: spend("gradient", images))
    monkeypatch.setattr(Evaluation, "right", lambda _, __, images, *___: spend("answer", images))
    monkeypatch.setattr("training.forecast.time.perf_counter", lambda: clock[0])
    assert unit_times(evaluation, evaluation.subjects()[0]) == UnitTimes(answer=1.0, gradient=1.0)


def test_what_serves_several_defenses_is_forecast_once(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.forecast.unit_times", lambda *_: UnitTimes(answer=60.0, gradient=0.0))
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=["zeropur", "auto"])
    rows = [line.split() for line in forecast(evaluation, evaluation.subjects()).splitlines()]
    level_4 = {row[0]: float(row[5]) for row in rows[1:-1]}
    verdicts = 4.0 * 4  # four attacks on four images
    assert level_4["zeropur"] > verdicts
    assert level_4["auto"] == verdicts


CHECKS = credibility.passes(4, 5, is_random=False)
"""Gradients and answers for each image, where a defense descends."""


def minutes_of_checks(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, unit: UnitTimes) -> dict[str, float]:
    monkeypatch.setattr("training.forecast.unit_times", lambda *_: unit)
    rows = [line.split() for line in forecast(evaluation, evaluation.subjects()).splitlines()]
    return {row[0]: float(row[8]) for row in rows[1:-1]}


def test_the_checks_are_forecast_where_there_is_a_worst_case_and_once(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["zeropur", "auto", "atop"]
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path, defenses=names, grey_box_only=["atop:rt3"])
    minutes = minutes_of_checks(evaluation, monkeypatch, UnitTimes(answer=0.0, gradient=60.0))
    assert minutes["zeropur"] == 6 * CHECKS[0]  # of no more images than are asked about
    assert minutes["auto"] == 10 * CHECKS[0]  # those of zeropur behind it are known
    assert minutes["atop"] == 20 * credibility.passes(8, 10, is_random=True)[0]
    assert minutes["atop:rt3"] == 0.0


def test_the_checks_of_a_gate_alone_are_those_of_what_stands_behind_it_too(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(20), tmp_path, defenses=["auto"])
    minutes = minutes_of_checks(evaluation, monkeypatch, UnitTimes(answer=60.0, gradient=0.0))
    clean, attacked = 6, 4
    assert minutes["auto"] == (10 + 6) * CHECKS[1] + clean + attacked


def test_no_checks_are_forecast_where_none_are_made(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluation_of(load_bundle(finished.bundle), color_set(8), tmp_path, defenses=["none"])
    efforts = {"one_pass": Effort(images=1), "descending": Effort(images=1)}
    grey = evaluation.recipe.model_copy(update={"budget": evaluation.recipe.effort.model_copy(update=efforts)})
    minutes = minutes_of_checks(replace(evaluation, recipe=grey), monkeypatch, UnitTimes(answer=60.0, gradient=60.0))
    assert minutes == {"none": 0.0}
    assert measure(replace(evaluation, recipe=grey), evaluation.subjects()[0]).report["worst_case"] is None


def test_a_gate_is_forecast_by_what_attacked_images_take(finished: Workshop, tmp_path: Path) -> None:
    bundle = load_bundle(finished.bundle)
    evaluation = evaluation_of(bundle, color_set(20), tmp_path)
    assert bundle.manifest.defenses.auto is not None
    (preset,) = bundle.manifest.defenses.auto.presets.values()
    assert preset.cheap == "none"
    expected = {"auto": preset.strong, "atop:rt3": "atop:rt3", "none": "none"}
    for name, timed in expected.items():
        assert evaluation.behind_the_gate(Subject(name, bundle.defended(name))).name == timed
