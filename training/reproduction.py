"""`python -m training.reproduction`: what the papers say beside what we measured, as a page, from finished evaluations.

The rows and the papers' numbers are in `recipes/reproduction/tables.toml`; ours come from the reports that `evaluate`
leaves under `runs/evaluations/`. Nothing of ours is typed by hand, and what was not run is called so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.manifest import Strict

TABLES = Path(__file__).parent / "recipes" / "reproduction" / "tables.toml"
NOT_RUN = "not run"


class Row(Strict):
    """One row of a paper's table, and where ours is."""

    name: str
    evaluation: str
    """The bundle and its recipe's name: `cifar10-1/atop-7` is `runs/evaluations/cifar10-1/atop-7.json`."""
    defense: str
    """As the report calls it; `none` is the undefended classifier."""
    recipe: str
    """The recipe of the evaluation, below `training/recipes/`."""
    bundle: str
    """What it is evaluated on."""
    paper: tuple[float, ...]
    """The paper's percentages, column by column; -1 where it has none."""


class Table(Strict):
    """A table of a paper, or the part of it that we have the means for."""

    title: str
    ours: str
    """What differs here, in a sentence."""
    columns: tuple[str, ...]
    """`standard`, or an attack of the report."""
    rows: tuple[Row, ...]


class Tables(Strict):
    """All of them."""

    tables: tuple[Table, ...]


def read_tables(path: Path = TABLES) -> tuple[Table, ...]:
    """The tables; raises ValueError if a row has not one number for every column."""
    tables = Tables.model_validate(tomllib.loads(path.read_text())).tables
    for table in tables:
        for row in table.rows:
            if len(row.paper) != len(table.columns):
                raise ValueError(
                    f"{table.title}, {row.name}: {len(row.paper)} numbers for {len(table.columns)} columns"
                )
    return tables


def page(tables: Iterable[Table], runs: Path) -> str:
    """The whole page, Markdown."""
    parts = [
        "# Reproduction",
        "",
        "The papers' tables as far as CIFAR-10 and two CPU cores go: their number, and ours in percent with",
        "Wilson's 95 % interval and n. `python -m training.reproduction` writes this page from the reports under",
        "`runs/evaluations/`; the commands under a table measure its rows. Networks and training are far smaller",
        "than the papers': directions should agree, not digits.",
    ]
    for table in tables:
        parts += ["", *section(table, runs)]
    return "\n".join(parts) + "\n"


def section(table: Table, runs: Path) -> list[str]:
    """One table with its commands."""
    reports = {row.evaluation: report_of(runs, row.evaluation) for row in table.rows}
    head = " | ".join(f"{column}, paper | ours" for column in table.columns)
    lines = [f"## {table.title}", "", table.ours, "", f"| | {head} |", "|---|" + "---|---|" * len(table.columns)]
    for row in table.rows:
        cells = []
        for column, paper in zip(table.columns, row.paper, strict=True):
            said = "–" if paper < 0 else f"{paper:.2f}"
            cells += [said, ours(reports[row.evaluation], row.defense, column)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", *commands(table, reports)]
    return lines


def ours(report: Mapping[str, Any] | None, defense: str, column: str) -> str:
    """Accuracy, interval and n of one cell."""
    entry = None if report is None else report["undefended"] if defense == "none" else report["defenses"].get(defense)
    if entry is None:
        return NOT_RUN
    groups = ("grey_box", "adaptive", "unseen")
    found = entry["standard"] if column == "standard" else None
    for group in groups:
        found = found or entry[group].get(column)
    if found is None:
        return NOT_RUN
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['accuracy']:.1f} ({low:.1f} to {high:.1f}, n {found['n']})"


def commands(table: Table, reports: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """How each evaluation is run, and on which machine it was."""
    lines = list[str]()
    for row in {row.evaluation: row for row in table.rows}.values():
        report = reports[row.evaluation]
        where = "not run yet"
        if report is not None:
            recipe = report["recipe"]
            hardware, minutes = recipe["hardware"], recipe["attacks_s"] / 60
            machine = hardware["gpu"] or f"{hardware['threads']} threads of {hardware['cpu']}"
            where = f"seed {recipe['seed']}, {machine}, {minutes:.0f} minutes, commit {recipe['git_commit'][:12]}"
        options = f"--recipe training/recipes/{row.recipe} --bundle {row.bundle} --keep-report"
        lines += [f"- `python -m training evaluate {options}`:", f"  {where}"]
    return lines


def report_of(runs: Path, evaluation: str) -> dict[str, Any] | None:
    """The report that an evaluation left, if it was run to its end."""
    path = runs / "evaluations" / f"{evaluation}.json"
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def main(arguments: list[str] | None = None) -> int:
    """Write the page; the exit status is 2 if the tables cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m training.reproduction", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where evaluations are")
    parser.add_argument("--output", type=Path, default=Path("docs/reproduction.md"), help="the page")
    options = parser.parse_args(arguments)
    try:
        text = page(read_tables(), options.runs)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
