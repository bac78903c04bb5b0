from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.config import EvaluateRecipe, read_recipe
from training.reproduction import NOT_RUN, TABLES, Row, Table, main, ours, page, read_tables

RECIPES = TABLES.parents[1]


def cell(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": [accuracy - 0.01, accuracy + 0.01], "n": 512}


def report() -> dict[str, Any]:
    entry = {"standard": cell(0.9), "grey_box": {"pgd20": cell(0.8)}, "adaptive": {"full": cell(0.3)}, "unseen": {}}
    hardware = {"cpu": "a processor", "threads": 2, "gpu": None}
    recipe = {"seed": 7, "hardware": hardware, "attacks_s": 240.0, "git_commit": "0123456789abcdef"}
    return {"undefended": {**entry, "standard": cell(0.95)}, "defenses": {"atop": entry}, "recipe": recipe}


def table() -> Table:
    where = {"recipe": "reproduction/atop-7.toml", "bundle": "runs/b/1"}
    rows = (
        Row(name="AToP", evaluation="b-1/one", defense="atop", paper=(90.0, 84.57, -1), **where),
        Row(name="none", evaluation="b-1/one", defense="none", paper=(93.0, 0.0, 0.0), **where),
        Row(name="other", evaluation="b-1/two", defense="atop", paper=(1.0, 2.0, 3.0), **where),
    )
    return Table(title="A table", ours="Smaller.", columns=("standard", "pgd20", "full"), rows=rows)


def runs_with_a_report(folder: Path) -> Path:
    path = folder / "evaluations" / "b-1" / "one.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report()))
    return folder


def test_the_page_has_the_papers_number_beside_ours(tmp_path: Path) -> None:
    lines = page([table()], runs_with_a_report(tmp_path)).splitlines()
    row = next(line for line in lines if line.startswith("| AToP"))
    assert row == (
        "| AToP | 90.00 | 90.0 (89.0 to 91.0, n 512) | 84.57 | 80.0 (79.0 to 81.0, n 512) "
        "| – | 30.0 (29.0 to 31.0, n 512) |"
    )
    undefended = next(line for line in lines if line.startswith("| none"))
    assert "95.0 (94.0 to 96.0, n 512)" in undefended
    assert next(line for line in lines if line.startswith("| other")).count(NOT_RUN) == 3
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1


def test_every_evaluation_stands_once_with_command_seed_machine_and_commit(tmp_path: Path) -> None:
    text = page([table()], runs_with_a_report(tmp_path))
    command = "`python -m training evaluate --recipe training/recipes/reproduction/atop-7.toml --bundle runs/b/1"
    assert text.count(command) == 2
    assert "seed 7, 2 threads of a processor, 4 minutes, commit 0123456789ab" in text
    assert "not run yet" in text


@pytest.mark.parametrize(("defense", "column"), [("atop", "cw"), ("aid", "pgd20"), ("none", "square")])
def test_what_a_report_does_not_have_was_not_run(defense: str, column: str) -> None:
    assert ours(report(), defense, column) == NOT_RUN


def test_the_shipped_tables_name_recipes_that_measure_their_columns() -> None:
    for shipped in read_tables():
        for row in shipped.rows:
            recipe = read_recipe(RECIPES / row.recipe, EvaluateRecipe)
            assert row.evaluation.endswith(f"/{recipe.name}")
            assert row.defense in {"none", *recipe.defenses, *recipe.grey_box_only}
            known = {"standard", *recipe.effort.grey_box}
            assert set(shipped.columns) <= known, row.name


def test_a_row_must_have_a_number_for_every_column(tmp_path: Path) -> None:
    path = tmp_path / "tables.toml"
    fields = 'name = "r", evaluation = "e", defense = "none", recipe = "r.toml", bundle = "b", paper = [1.0]'
    path.write_text(f'[[tables]]\ntitle = "T"\nours = "."\ncolumns = ["standard", "fgsm"]\nrows = [{{ {fields} }}]\n')
    with pytest.raises(ValueError, match="T, r: 1 numbers for 2 columns"):
        read_tables(path)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    assert main(["--runs", str(tmp_path), "--output", str(tmp_path / "docs" / "page.md")]) == 0
    assert (tmp_path / "docs" / "page.md").read_text() == page(read_tables(), tmp_path)
    assert main(["--output", str(tmp_path)]) == 2  # a folder
