"""`python -m training.reproduction`: what the papers say beside what we measured, as a page, from finished evaluations.

The rows and the papers' numbers are in `recipes/reproduction/tables.toml`; ours come from the reports that `evaluate`
leaves under `runs/evaluations/`. They are kept beside the page, so that it outlives the run directories and each of its
numbers can be looked up. A kept report with a `note` is none that `evaluate` wrote: it was put together from an earlier
state of the page after the run directory was lost. What was not run is called so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from models.manifest import Fraction, Strict
from training.budgets import Budget
from training.config import EvaluateRecipe, RecipeError
from training.provenance import content_sha256
from training.reading import read_recipe
from training.statistics import paired

TABLES = Path(__file__).parent / "recipes" / "reproduction" / "tables.toml"
NOT_RUN = "not run"
LOST = "†"
"""Behind a number whose report is lost."""
WORST = "worst"
"""A column of AID's tables: the smallest of a row's grey-box accuracies, not image by image."""
SURE = 0.05
"""A sign test's p-value that is smaller decides."""
IN_PAPERS_SIZE = " (paper's size)"
HOLDS, OPEN, FAILS = "holds", "cannot be told apart", "**does not hold**"
SETTINGS = {"seed", "eps", "batch_size", "defenses", "grey_box_only", "zeropur_variants", "further", "votes"}
VERDICTS = (HOLDS, OPEN, FAILS)
"""From good to bad: that of an order of several is the worst of its pairs."""


class Row(Strict):
    """One row of a paper's table, and where ours is."""

    name: str
    bundle: str
    """The directory that is evaluated, which ends in name and version: small enough for two CPU cores, except in rows
    that exist in the paper's size alone."""
    paper_bundle: str | None = None
    """The same with the paper's network; it has a row of its own once it has been evaluated."""
    recipe: str
    """Name of the evaluation's recipe in `training/recipes/reproduction/`, and of the report it leaves."""
    paper_recipe: str | None = None
    """The same for `paper_bundle`, where it is another: one that names layers, or has the paper's steps and images."""
    defense: str
    """As the report calls it; `none` is the undefended classifier."""
    paper: tuple[float, ...]
    """The paper's percentages, column by column; -1 where it has none."""

    @property
    def report(self) -> str:
        """Where the evaluation leaves its report, below `runs/evaluations/`, and where it is kept."""
        name, version = Path(self.bundle).parts[-2:]
        return f"{name}-{version}/{self.recipe}.json"

    def in_papers_size(self) -> Row | None:
        """The same row with the paper's network, if it has one."""
        if self.paper_bundle is None:
            return None
        return self.model_copy(update={"bundle": self.paper_bundle, "recipe": self.paper_recipe or self.recipe})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.paper_recipe is not None and self.paper_bundle is None:
            raise ValueError(f"{self.name}: paper_recipe is for a paper_bundle")
        return self


class Direction(Strict):
    """What must hold of our numbers if the paper's story does."""

    says: str
    cells: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    """Row and column: each accuracy larger than the next one's."""
    at_most: Fraction | None = None
    """Or, for a single cell: the accuracy at most this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (len(self.cells) == 1) != (self.at_most is not None):
            raise ValueError(f"{self.says}: one cell needs at_most, several are in an order")
        return self


class Table(Strict):
    """A table of a paper, or the part of it that we have the means for."""

    title: str
    ours: str
    """What differs here, in a sentence."""
    columns: tuple[str, ...]
    """`standard`, an attack of the report, or `worst`."""
    made_by: tuple[str, ...] = ()
    """What makes its bundles: commands of `training`, with their recipes but for `unpack`, in order."""
    paper_size: tuple[str, ...] = ()
    """What makes the same with the paper's networks, on a GPU."""
    rows: tuple[Row, ...]
    directions: tuple[Direction, ...] = ()
    remark: str = ""
    """What we think of the differences, written after measuring."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for row in self.rows:
            if len(row.paper) != len(self.columns):
                raise ValueError(f"{self.title}, {row.name}: {len(row.paper)} numbers for {len(self.columns)} columns")
        names = [row.name for row in self.rows]
        for direction in self.directions:
            for name, column in direction.cells:
                if names.count(name) != 1 or column not in self.columns:
                    raise ValueError(f"{self.title}, {direction.says}: there is no cell {name}, {column}")
        return self

    @property
    def grown(self) -> tuple[Row, ...]:
        """The rows with the paper's networks, under the names of the small ones."""
        return tuple(each for row in self.rows if (each := row.in_papers_size()) is not None)


class Tables(Strict):
    """All of them."""

    tables: tuple[Table, ...]


Reports = Mapping[str, Mapping[str, Any] | None]
"""By `Row.report`; None for an evaluation that was not run to its end."""


def read_tables(path: Path = TABLES) -> tuple[Table, ...]:
    """The tables; raises ValueError for a row without a number for every column, and for cells that are not there."""
    return Tables.model_validate(tomllib.loads(path.read_text())).tables


def page(tables: Iterable[Table], kept: Path) -> str:
    """The whole page, Markdown."""
    parts = [
        "# Reproduction",
        "",
        "The papers' tables as far as CIFAR-10 and two CPU cores go: their number, and ours in percent with",
        "Wilson's 95 % interval and n. `python -m training.reproduction` takes the reports that the commands under",
        "a table left in `runs/evaluations/`, keeps them in `docs/reproduction/`, and writes this page from those.",
        "Networks and training are far smaller than the papers': directions should agree, not digits. Whether one",
        "holds is decided image by image, by a sign test at 5 %, which sees smaller differences than intervals do.",
        "Every command is one of `python -m training`, with `--recipe training/recipes/` in front of the name of its",
        "recipe if it has one, and `--data FOLDER` if the data is there. Behind a † the report itself is lost: the",
        "number is that of an earlier state of this page, without its images, so that only intervals tell.",
    ]
    for table in tables:
        parts += ["", *section(table, kept)]
    return "\n".join(parts) + "\n"


def section(table: Table, kept: Path) -> list[str]:
    """One table with what must hold of it, and its commands."""
    small, grown = {row.name: row for row in table.rows}, evaluated_in_papers_size(table, kept)
    rows = [*small.values(), *grown.values()]
    reports = {row.report: report_of(kept, row) for row in rows}
    head = " | ".join(f"{column}, paper | ours" for column in table.columns)
    lines = [f"## {table.title}", "", table.ours, "", f"| | {head} |", "|---|" + "---|---|" * len(table.columns)]
    for row in rows:
        cells = []
        for column, paper in zip(table.columns, row.paper, strict=True):
            said = "–" if paper < 0 else f"{paper:.2f}"
            found = cell(reports, row, column)
            lost = LOST if found is not None and "note" in (reports[row.report] or {}) else ""
            cells += [said, written(found) + lost]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    if table.directions:
        lines += ["", *(judged(direction, small, reports) for direction in table.directions)]
        whole = [each for each in table.directions if grown.keys() >= {name for name, _ in each.cells}]
        lines += [judged(direction, grown, reports, IN_PAPERS_SIZE) for direction in whole]
    if table.remark:
        lines += ["", table.remark]
    folded = "<details><summary>Commands, seeds, machines and commits</summary>"
    return [*lines, "", folded, "", *commands(table, reports), "", "</details>"]


def evaluated_in_papers_size(table: Table, kept: Path) -> dict[str, Row]:
    """The rows with the paper's networks that have been evaluated, by the names of the small ones."""
    grown = {row.name: row.model_copy(update={"name": row.name + IN_PAPERS_SIZE}) for row in table.grown}
    return {name: row for name, row in grown.items() if report_of(kept, row) is not None}


def cell(reports: Reports, row: Row, column: str) -> Mapping[str, Any] | None:
    """Accuracy, interval and n, and the images' outcomes where the report has them; None if they were not measured."""
    report = reports[row.report]
    if report is None:
        return None
    entry = {"none": report["undefended"], **report["defenses"], **report.get("grey_box_only", {})}.get(row.defense)
    if entry is None:
        return None
    if column == WORST and entry["grey_box"]:
        column = min(entry["grey_box"], key=lambda name: entry["grey_box"][name]["accuracy"])
    named = {"standard": entry["standard"], **entry["grey_box"], **entry["adaptive"], **entry["unseen"]}
    found: Mapping[str, Any] | None = named.get(column)
    right = report.get("outcomes", {}).get(row.defense, {}).get(column)
    if found is None or right is None:
        return found
    return {**found, "right": right, "images": [report["recipe"][what] for what in ("data_sha256", "seed")]}


def written(found: Mapping[str, Any] | None) -> str:
    """A cell as the table has it."""
    if found is None:
        return NOT_RUN
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['accuracy']:.1f} ({low:.1f} to {high:.1f}, n {found['n']})"


def judged(direction: Direction, rows: Mapping[str, Row], reports: Reports, size: str = "") -> str:
    """The direction, whether it holds, and by which numbers; what their intervals leave open is said to be open."""
    cells = [cell(reports, rows[name], column) for name, column in direction.cells]
    found = [each for each in cells if each is not None]
    if len(found) < len(cells):
        return f"- {direction.says}{size}: {NOT_RUN}."
    if direction.at_most is not None:
        low, high = found[0]["interval"]
        verdict = HOLDS if high <= direction.at_most else FAILS if low > direction.at_most else OPEN
    else:
        verdict = max((order(*pair) for pair in itertools.pairwise(found)), key=VERDICTS.index)
    numbers = ", ".join(f"{100 * each['accuracy']:.1f}" for each in found)
    return f"- {direction.says}{size}: {verdict} ({numbers})."


def order(larger: Mapping[str, Any], smaller: Mapping[str, Any]) -> str:
    """Whether the first accuracy is larger than the second: on the same images only what a sign test shows.

    Where outcomes are missing or of other images, it is only what intervals that do not overlap show.
    """
    if "right" in larger and "right" in smaller and larger["images"] == smaller["images"]:
        one, other = (torch.tensor([digit == "1" for digit in each["right"]]) for each in (larger, smaller))
        found = paired(one, other)
        if found["p_value"] >= SURE:
            return OPEN
        return HOLDS if found["difference"] > 0 else FAILS
    if larger["interval"][0] > smaller["interval"][1]:
        return HOLDS
    return FAILS if larger["interval"][1] < smaller["interval"][0] else OPEN


def commands(table: Table, reports: Reports) -> list[str]:
    """How the bundles are made and evaluated, and on which machine; the same with the paper's networks."""
    lines = [f"- `{command}`" for command in table.made_by]
    lines += [evaluation(row, reports) for row in {row.report: row for row in table.rows}.values()]
    if table.paper_size:
        steps = ", ".join(f"`{command}`" for command in table.paper_size)
        lines += [f"- In the paper's size, for a GPU: {steps}"]
    return lines + [evaluation(row, reports) for row in {row.report: row for row in table.grown}.values()]


def evaluation(row: Row, reports: Reports) -> str:
    """The command that measures a row, and how it was done."""
    report, where = reports.get(row.report), NOT_RUN
    if report is not None:
        recipe = report["recipe"]
        hardware, minutes = recipe["hardware"], recipe["attacks_s"] / 60
        threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
        machine = hardware["gpu"] or f"{threads} of {hardware['cpu']}"
        where = f"seed {recipe['seed']}, {machine}, {minutes:.0f} minutes, commit {recipe['git_commit'][:12]}"
        where += f"; {report['note']}" if "note" in report else ""
    return f"- `evaluate reproduction/{row.recipe}.toml --bundle {row.bundle} --keep-report`: {where}"


def report_of(kept: Path, row: Row) -> dict[str, Any] | None:
    """The report that the row's evaluation left, if it was run to its end.

    Raises ValueError for one that was measured by another recipe of that name, with other options, or with other
    weights or presets than its bundle has now, if that is at hand. One with a `note` says itself what it is.
    """
    path = kept / row.report
    return checked(path, row) if path.exists() else None


def checked(path: Path, row: Row) -> dict[str, Any]:
    """The report at `path`. Raises as `report_of`."""
    found: dict[str, Any] = json.loads(path.read_text())
    recipe = read_recipe(TABLES.parent / f"{row.recipe}.toml", EvaluateRecipe)
    wanted = recipe.model_dump(mode="json", include=SETTINGS) | {"budget": recipe.effort.model_dump(mode="json")}
    spent = Budget.model_validate(found["recipe"]["budget"])  # what it could not yet say is what it did by default
    had = {"votes": 1} | found["recipe"] | {"budget": spent.model_dump(mode="json")}
    if other := [name for name, value in wanted.items() if had.get(name) != value]:
        raise ValueError(f"{path} was not measured by {row.recipe}.toml as it is now: {', '.join(other)} differ")
    bundle = Path(row.bundle) / "bundle.json"
    known = found["recipe"].get("content_sha256")
    if "note" in found and (known or "outcomes" in found):
        raise ValueError(f"{path} has a note, as if it were lost, and what only a whole report has")
    if "note" not in found and bundle.exists() and content_sha256(bundle.read_bytes()) != known:
        raise ValueError(f"{path} was measured with other weights or presets than {row.bundle} has now")
    return found


def keep(tables: Iterable[Table], runs: Path, kept: Path) -> None:
    """Take the reports of `tables` that finished evaluations left below `runs`, each in the place of the kept one.

    Raises as `report_of` before anything is replaced.
    """
    rows = [row for table in tables for row in (*table.rows, *table.grown)]
    found = {row.report: runs / "evaluations" / row.report for row in rows}
    for row in rows:
        if found[row.report].exists():
            checked(found[row.report], row)
    for name, path in found.items():
        if path.exists():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / name)


def main(arguments: list[str] | None = None) -> int:
    """Keep new reports and write the page; the exit status is 2 if tables or reports cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m training.reproduction", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where evaluations are")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/reproduction.md"),
        help="the page; reports are kept in a folder beside it",
    )
    options = parser.parse_args(arguments)
    try:
        tables, kept = read_tables(), options.output.with_suffix("")
        keep(tables, options.runs, kept)
        text = page(tables, kept)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    except (OSError, ValueError, RecipeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
