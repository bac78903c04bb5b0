from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.classifiers import build_classifier
from tests.training.tiny import Workshop
from training import reproduction
from training.__main__ import RECIPES
from training.config import EvaluateRecipe
from training.provenance import content_sha256
from training.reading import read_recipe
from training.reproduction import NOT_RUN, TABLES, Direction, Row, Table, cell, main, order, page, read_tables

FOLDER = TABLES.parents[1]


OPEN_ORDER = "cannot be told apart (95.0, 90.0, 80.0, 80.0)"


def measured(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": [accuracy - 0.01, accuracy + 0.01], "n": 512}


def settings() -> dict[str, Any]:
    """What a report says of the recipe that it was measured by."""
    recipe = read_recipe(FOLDER / "reproduction/atop-7.toml", EvaluateRecipe)
    return recipe.model_dump(mode="json") | {"budget": recipe.effort.model_dump(mode="json")}


def report() -> dict[str, Any]:
    entry = {
        "standard": measured(0.9),
        "grey_box": {"pgd20": measured(0.8)},
        "adaptive": {"full": measured(0.3)},
        "unseen": {},
    }
    hardware = {"cpu": "a processor", "threads": 2, "gpu": None}
    recipe = settings() | {"hardware": hardware, "attacks_s": 240.0, "git_commit": "0123456789abcdef"}
    recipe["content_sha256"], recipe["data_sha256"] = "1" * 64, "0" * 64
    return {"undefended": {**entry, "standard": measured(0.95)}, "defenses": {"atop": entry}, "recipe": recipe}


def row(name: str, defense: str, paper: tuple[float, ...], recipe: str = "atop-7") -> Row:
    return Row(name=name, bundle="runs/b/1", recipe=recipe, defense=defense, paper=paper)


def table(*directions: Direction) -> Table:
    rows = (
        row("AToP", "atop", (90.0, 84.57, -1)),
        row("none", "none", (93.0, 0.0, 0.0)),
        row("other", "atop", (1.0, 2.0, 3.0), recipe="aid-8"),
    )
    return Table(
        title="A table",
        ours="Smaller.",
        columns=("standard", "pgd20", "full"),
        made_by=("export b.toml",),
        rows=rows,
        directions=directions,
    )


def kept_report(folder: Path) -> Path:
    path = folder / "b-1" / "atop-7.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report()))
    return folder


def test_the_page_has_the_papers_number_beside_ours(tmp_path: Path) -> None:
    lines = page([table()], kept_report(tmp_path)).splitlines()
    defended = next(line for line in lines if line.startswith("| AToP"))
    assert defended == (
        "| AToP | 90.00 | 90.0 (89.0 to 91.0, n 512) | 84.57 | 80.0 (79.0 to 81.0, n 512) "
        "| – | 30.0 (29.0 to 31.0, n 512) |"
    )
    undefended = next(line for line in lines if line.startswith("| none"))
    assert "95.0 (94.0 to 96.0, n 512)" in undefended
    assert next(line for line in lines if line.startswith("| other")).count(NOT_RUN) == 3
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert len(columns) == 1


def test_the_papers_size_has_a_row_once_it_was_evaluated(tmp_path: Path) -> None:
    plain = table()
    grown = plain.model_copy(
        update={"rows": tuple(each.model_copy(update={"paper_bundle": "runs/big/1"}) for each in plain.rows)}
    )
    kept = kept_report(tmp_path)
    before = page([grown], kept)
    assert "(paper's size)" not in before
    assert "runs/big/1 --keep-report`: not run" in before
    big = kept / "big-1"
    big.mkdir()
    (big / "atop-7.json").write_text(json.dumps(report()))
    text = page([grown], kept)
    assert "| AToP (paper's size) | 90.00 | 90.0" in text
    assert "atop-7.toml --bundle runs/big/1 --keep-report`: seed 0, 2 threads of a processor" in text
    assert "| other (paper's size)" not in text


def test_every_evaluation_stands_once_with_command_seed_machine_and_commit(tmp_path: Path) -> None:
    text = page([table()], kept_report(tmp_path))
    assert text.count("`evaluate reproduction/atop-7.toml --bundle runs/b/1 --keep-report`") == 1
    assert "seed 0, 2 threads of a processor, 4 minutes, commit 0123456789ab" in text
    assert "`evaluate reproduction/aid-8.toml --bundle runs/b/1 --keep-report`: not run" in text
    assert "- `export b.toml`" in text


@pytest.mark.parametrize(
    ("cells", "at_most", "said"),
    [
        ([("none", "standard"), ("AToP", "standard"), ("AToP", "full")], None, "holds (95.0, 90.0, 30.0)"),
        ([("AToP", "standard"), ("none", "standard")], None, "**does not hold** (90.0, 95.0)"),
        ([("AToP", "pgd20"), ("none", "pgd20")], None, "cannot be told apart (80.0, 80.0)"),
        ([("none", "standard"), ("AToP", "standard"), ("none", "pgd20"), ("AToP", "pgd20")], None, OPEN_ORDER),
        ([("AToP", "full")], 0.32, "holds (30.0)"),
        ([("AToP", "full")], 0.3, "cannot be told apart (30.0)"),
        ([("AToP", "full")], 0.28, "**does not hold** (30.0)"),
        ([("AToP", "full"), ("other", "full")], None, "not run"),
    ],
)
def test_a_direction_is_judged_by_what_was_measured(
    cells: tuple[tuple[str, str], ...], at_most: float | None, said: str, tmp_path: Path
) -> None:
    direction = Direction(says="It falls", cells=tuple(cells), at_most=at_most)
    assert f"- It falls: {said}." in page([table(direction)], kept_report(tmp_path)).splitlines()


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [(8, 1, "holds"), (4, 1, "cannot be told apart"), (1, 8, "**does not hold**"), (0, 0, "cannot be told apart")],
)
def test_on_the_same_images_a_sign_test_decides(better: int, worse: int, said: str, tmp_path: Path) -> None:
    kept, both = kept_report(tmp_path), "1" * 300 + "0" * 200
    outcomes = {
        "atop": {"pgd20": both + "1" * better + "0" * worse},
        "none": {"pgd20": both + "0" * better + "1" * worse},
    }
    path = kept / "b-1" / "atop-7.json"
    path.write_text(json.dumps({**report(), "outcomes": outcomes}))
    direction = Direction(says="It helps", cells=(("AToP", "pgd20"), ("none", "pgd20")))
    assert f"- It helps: {said} (80.0, 80.0)." in page([table(direction)], kept).splitlines()


def test_outcomes_of_other_images_are_not_compared_one_by_one() -> None:
    def found(accuracy: float, right: str, seed: int) -> dict[str, Any]:
        return {**measured(accuracy), "right": right, "images": ["0" * 64, seed]}

    low, high = "1" * 10 + "0" * 10, "1" * 20
    assert order(found(0.9, low, 0), found(0.8, high, 1)) == "holds"  # by their intervals
    assert order(found(0.9, low, 0), found(0.8, high, 0)) == "**does not hold**"


def test_a_direction_is_judged_again_for_the_papers_size(tmp_path: Path) -> None:
    direction = Direction(says="It falls", cells=(("none", "standard"), ("AToP", "standard")))
    kept = kept_report(tmp_path)
    grown = table(direction)
    rows = [each.model_copy(update={"paper_bundle": "runs/b/1", "bundle": "runs/none/1"}) for each in grown.rows]
    lines = page([grown.model_copy(update={"rows": tuple(rows)})], kept).splitlines()
    assert "- It falls: not run." in lines
    assert "- It falls (paper's size): holds (95.0, 90.0)." in lines


@pytest.mark.parametrize(("defense", "column"), [("atop", "cw"), ("aid", "pgd20"), ("none", "square")])
def test_what_a_report_does_not_have_was_not_run(defense: str, column: str) -> None:
    wanted = row("r", defense, (1.0,))
    assert cell({wanted.report: report()}, wanted, column) is None


def test_the_worst_of_a_row_is_its_smallest_grey_box_accuracy() -> None:
    wanted, found = row("r", "atop", (1.0,)), report()
    found["defenses"]["atop"]["grey_box"] = {"pgd20": measured(0.8), "mim": measured(0.7), "cw": measured(0.9)}
    assert cell({wanted.report: found}, wanted, "worst") == measured(0.7)
    found["defenses"]["atop"]["grey_box"] = {}
    assert cell({wanted.report: found}, wanted, "worst") is None


def test_the_shipped_tables_name_recipes_that_measure_their_cells() -> None:
    for shipped in read_tables():
        both = [each for each in (*shipped.rows, *(row.in_papers_size() for row in shipped.rows)) if each is not None]
        for wanted in both:
            recipe = read_recipe(FOLDER / f"reproduction/{wanted.recipe}.toml", EvaluateRecipe)
            assert wanted.recipe == recipe.name
            assert wanted.defense in {"none", *recipe.defenses, *recipe.grey_box_only}
            known = {"standard", *recipe.effort.grey_box, *(attack.name for attack in recipe.further)}
            known |= {"worst"} if recipe.effort.grey_box else set()
            assert set(shipped.columns) <= known, wanted.name


def test_the_shipped_tables_name_commands_and_recipes_that_are_there() -> None:
    made = {command for shipped in read_tables() for command in (*shipped.made_by, *shipped.paper_size)}
    assert made
    for command in made:
        name, path, *others = command.split()
        if name == "unpack":
            assert (FOLDER.parents[1] / others[0] / "bundle.json").is_file()
        else:
            read_recipe(FOLDER / path, RECIPES[name])


def test_a_row_must_have_a_number_for_every_column_and_a_direction_its_cells() -> None:
    with pytest.raises(ValueError, match="A table, r: 1 numbers for 3 columns"):
        Table(**{**table().model_dump(), "rows": [row("r", "none", (1.0,))]})
    with pytest.raises(ValueError, match="there is no cell AToP, fgsm"):
        table(Direction(says="It falls", cells=(("AToP", "fgsm"),), at_most=0.1))
    with pytest.raises(ValueError, match="there is no cell nobody, full"):
        table(Direction(says="It falls", cells=(("nobody", "full"),), at_most=0.1))


@pytest.mark.parametrize("cells", [(("AToP", "full"),), ()])
def test_a_direction_that_could_not_fail_is_refused(cells: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ValueError, match=r"one cell needs at_most|at least 1 item"):
        Direction(says="It falls", cells=cells)


def test_the_papers_size_may_have_a_recipe_of_its_own() -> None:
    small = row("r", "none", (1.0,)).model_copy(update={"bundle": "runs/small/1", "recipe": "zeropur-12-small"})
    assert small.in_papers_size() is None
    fields = {**small.model_dump(), "paper_bundle": "runs/big/2"}
    for paper_recipe, report_name in ((None, "zeropur-12-small"), ("zeropur-12", "zeropur-12")):
        grown = Row(**{**fields, "paper_recipe": paper_recipe}).in_papers_size()
        assert grown is not None
        assert grown.report == f"big-2/{report_name}.json"
    with pytest.raises(ValueError, match="r: paper_recipe is for a paper_bundle"):
        Row(**{**small.model_dump(), "paper_recipe": "zeropur-12"})


def test_the_layers_of_a_recipe_are_those_of_the_network_it_is_for() -> None:
    layers = {
        name: {
            layer
            for variant in read_recipe(FOLDER / f"reproduction/{name}.toml", EvaluateRecipe).zeropur_variants.values()
            for layer in variant.get("coarse_layers", ())
        }
        for name in ("zeropur-12-small", "zeropur-12")
    }
    small, large = (build_classifier(name, num_classes=10, input_size=32) for name in ("resnet9-half", "resnet18"))
    assert layers["zeropur-12-small"] == set(small.feature_names) - {"head"}
    assert layers["zeropur-12"] == {"stage1", "stage2", "stage3", "stage4", "pool"}
    assert layers["zeropur-12"] < set(large.feature_names)


def test_a_report_by_another_recipe_is_refused(tmp_path: Path) -> None:
    kept = kept_report(tmp_path)
    path = kept / "b-1" / "atop-7.json"
    path.write_text(json.dumps({**report(), "recipe": {**settings(), "seed": 1}}))
    with pytest.raises(ValueError, match=r"not measured by atop-7.toml as it is now: seed differ"):
        page([table()], kept)
    path.write_text(json.dumps({**report(), "recipe": {**settings(), "votes": 8}}))
    with pytest.raises(ValueError, match=r"not measured by atop-7.toml as it is now: votes differ"):
        page([table()], kept)


def test_a_report_of_another_state_of_the_bundle_is_refused(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_report(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.bundle, tmp_path / "runs" / "b" / "1")
    with pytest.raises(ValueError, match="other weights or presets than runs/b/1 has now"):
        page([table()], kept)
    own = content_sha256((finished.bundle / "bundle.json").read_bytes())
    path = kept / "b-1" / "atop-7.json"
    path.write_text(json.dumps({**report(), "recipe": report()["recipe"] | {"content_sha256": own}}))
    assert "90.0 (89.0 to 91.0, n 512)" in page([table()], kept)


def test_a_report_with_a_note_says_itself_what_it_is(
    finished: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_report(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.bundle, tmp_path / "runs" / "b" / "1")
    path, lost = kept / "b-1" / "atop-7.json", {**report(), "note": "of a former bundle"}
    path.write_text(json.dumps(lost))
    with pytest.raises(ValueError, match="what only a whole report has"):
        page([table()], kept)
    del lost["recipe"]["content_sha256"]
    path.write_text(json.dumps(lost))
    text = page([table()], kept)
    assert "commit 0123456789ab; of a former bundle" in text
    assert "| AToP | 90.00 | 90.0 (89.0 to 91.0, n 512)† |" in text


def test_the_command_keeps_new_reports_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "read_tables", lambda: (table(),))
    kept_report(tmp_path / "runs" / "evaluations")
    command = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "docs" / "page.md")]
    assert main(command) == 0
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "90.0 (89.0 to 91.0, n 512)" in text
    new = tmp_path / "runs" / "evaluations" / "b-1" / "atop-7.json"
    new.write_text(json.dumps({**report(), "recipe": {**settings(), "seed": 1}}))
    assert main(command) == 2  # of another recipe: what is kept stays
    shutil.rmtree(tmp_path / "runs")
    assert main(command) == 0
    assert (tmp_path / "docs" / "page.md").read_text() == text
    assert main(["--output", str(tmp_path)]) == 2  # a folder


def test_what_is_kept_is_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = FOLDER.parents[1] / "docs"
    monkeypatch.chdir(tmp_path)  # away from bundles that somebody trains anew
    assert (docs / "reproduction.md").read_text() == page(read_tables(), docs / "reproduction")
