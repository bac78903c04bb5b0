from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from tests.training.tiny import DATA, RECIPES, Workshop
from training.__main__ import RECIPES as KINDS
from training.__main__ import main, parse, typed
from training.config import ClassifierRecipe, DataRecipe, RecipeError
from training.data import load_split
from training.reading import read_recipe
from training.runs import Run

RECIPE_FOLDER = Path(__file__).parents[2] / "training" / "recipes"
SHIPPED = sorted(path for path in RECIPE_FOLDER.rglob("*.toml") if path.name != "tables.toml")
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def command_of(recipe: Path) -> str:
    """The one command that takes the recipe."""
    takers = []
    for command, kind in KINDS.items():
        with suppress(RecipeError):
            read_recipe(recipe, kind)
            takers.append(command)
    (command,) = takers
    return command


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main([command_of(recipe), "--recipe", str(recipe), "--dry-run"]) == 0

    printed = json.loads(capsys.readouterr().out)
    resolved = KINDS[command_of(recipe)].model_validate(printed)
    assert resolved == read_recipe(recipe, KINDS[command_of(recipe)])
    assert printed.keys() == KINDS[command_of(recipe)].model_fields.keys()  # defaults are spelt out
    assert not any(tmp_path.iterdir())


def test_every_command_has_a_shipped_recipe() -> None:
    assert {command_of(recipe) for recipe in SHIPPED} == set(KINDS)


@pytest.mark.parametrize("command", KINDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--recipe" in said
    assert "--dry-run" in said


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["train"],
        ["train-aid"],
        ["export", "--recipe", "r.toml", "--data", "elsewhere"],  # it would change nothing
        ["train-aid", "--recipe", "r.toml", "--budget", "quick"],
        ["evaluate", "--recipe", "r.toml", "--precision", "float32"],
        ["evaluate", "--recipe", "r.toml", "--budget", "lavish"],
        ["evaluate", "--recipe", "r.toml", "--fail-below", "38"],  # a share, not a percentage
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(line: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(line)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", KINDS)
def test_a_wrong_recipe_is_refused_by_file_and_field_and_nothing_is_written(
    command: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    field = "batch_size" if "batch_size" in RECIPES[command] else "version"
    before = sorted(workshop.folder.rglob("*"))

    assert workshop.run(command, {field: 0, "surprise": 1}) == 2

    said = capsys.readouterr().err
    assert f"{command}.toml" in said
    assert f"  {field}: " in said
    assert "  surprise: " in said
    assert [path for path in sorted(workshop.folder.rglob("*")) if path.suffix != ".toml"] == before


@pytest.mark.parametrize("source", ["no/such-data-set", "."])
def test_data_that_is_not_there_is_refused_and_nothing_is_written(
    source: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    line = workshop.arguments("train-classifier")
    line[line.index("--data") + 1] = source
    assert main(line) == 2
    assert source in capsys.readouterr().err
    assert not workshop.runs.exists()


@pytest.mark.parametrize("command", ["train-classifier", "pretrain-purifier", "finetune-atop", "train-aid"])
def test_the_precision_of_training_may_be_another_than_the_recipes(
    command: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    line = workshop.arguments(command, {"precision": "bfloat16"})
    assert main([*line, "--precision", "float32", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "float32"


@pytest.mark.parametrize(("precision", "warned"), [("bfloat16", True), ("float32", False)])
def test_training_says_when_the_cpu_emulates_its_precision(
    precision: str,
    warned: bool,
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.__main__.computes_bfloat16", lambda device: False)
    line = workshop.arguments("train-classifier", {"precision": precision})
    line[line.index("--data") + 1] = "."  # no data, so nothing is trained
    assert main(line) == 2
    assert ("--precision float32" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("command", "missing"), [("finetune-atop", "purifier"), ("train-aid", "classifier"), ("export", "classifier")]
)
def test_a_run_that_is_needed_and_missing_is_named(
    command: str, missing: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.run(command) == 2
    assert f"there is no run {missing}" in capsys.readouterr().err
    assert not workshop.runs.exists()
    assert not workshop.bundle.exists()


def test_a_missing_bundle_is_refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("evaluate") == 2
    assert "bundle.json" in capsys.readouterr().err


def test_evaluate_without_a_recipe_takes_every_defense_on_the_data_that_the_bundle_was_trained_on(
    finished: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate", "--bundle", str(finished.bundle), "--budget", "quick", "--dry-run"]
    assert main([*line, "--data", str(finished.folder / "data")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"] == {
        **DataRecipe.model_validate(DATA).model_dump(mode="json"),
        "source": str(finished.folder / "data"),
    }
    assert (printed["defenses"], printed["budget"]) == ([], "quick")
    assert (
        main([*line, "--data", str(finished.folder / "data"), "--transfer-from", "a/1", "--transfer-from", "b/2"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["transfer_from"] == ["a/1", "b/2"]

    assert main(line) == 2
    assert "--data" in capsys.readouterr().err


def test_without_a_recipe_neighbors_are_transferred_from_and_named_in_the_command(
    finished: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.__main__.neighbors", lambda bundle: [Path("models/bundles/other/3")])
    commands = list[str]()
    monkeypatch.setattr("training.evaluate.evaluate", lambda *_, command, **__: commands.append(command))
    monkeypatch.setattr("training.report.table", lambda report: "")
    line = ["evaluate", "--bundle", str(finished.bundle), "--data", str(finished.folder / "data")]

    assert main([*line, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["transfer_from"] == ["models/bundles/other/3"]
    assert main(line) == 0
    assert "--transfer-from models/bundles/other/3" in commands[0]
    assert main([*line, "--transfer-from", "a/1", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["transfer_from"] == ["a/1"]


def test_a_training_command_prints_its_summary_as_json(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("train-classifier", {"epochs": 0.5, "warmup_epochs": 0}) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((workshop.runs / "classifier" / "summary.json").read_text())
    assert printed["steps"] == 3


def test_a_run_cannot_be_taken_over_by_another_recipe(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(Path(workshop.arguments("train-classifier")[2]), ClassifierRecipe)
    Run(workshop.runs, recipe).restore({}, {})
    assert workshop.run("train-classifier", {"lr": 0.1}) == 2
    assert "belongs to another recipe" in capsys.readouterr().err


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the CIFAR-10 parquet files are not in ../shared/data/cifar10")
def test_the_shipped_recipes_read_cifar10() -> None:
    recipe = next(path for path in SHIPPED if path.stem == "classifier")
    test = load_split(read_recipe(recipe, ClassifierRecipe, data_source=str(CIFAR)).data, "test")
    assert test.images.shape[1:] == (3, 32, 32)
    assert test.classes[3] == "cat"
    assert len(test) >= 8000
    assert test.labels.bincount() / len(test) == pytest.approx([0.1] * 10, abs=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data /home/somebody/cifar10", "--bundle models/bundles/cifar10/1 --data FOLDER"),
        ("--recipe a/b.toml --bundle c/d/1 --keep-report", "--recipe a/b.toml --bundle c/d/1 --keep-report"),
        (
            "--recipe b.toml --bundle c/1 --transfer-from d/1 --transfer-from /home/somebody/e",
            "--recipe b.toml --bundle c/1 --transfer-from d/1 --transfer-from e",
        ),
        (
            "--data FOLDER --defense atop --votes 8 --keep-report",
            "--bundle models/bundles/cifar10/1 --data FOLDER --defense atop --votes 8 --keep-report",
        ),
        (
            "--recipe /home/somebody/b.toml --budget quick --defense atop --defense aid,atop",
            "--recipe b.toml --bundle models/bundles/cifar10/1 --budget quick --defense atop --defense aid,atop",
        ),
    ],
)
def test_a_report_says_what_was_typed_without_the_machines_folders(options: str, said: str) -> None:
    assert typed(parse(["evaluate", *options.split()])) == f"python -m training evaluate {said}"
