"""The list of rows names tests that exist, and all of those that name its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
WANTED = {*range(4, 15), *range(20, 25), *range(47, 58), *range(63, 80), *range(82, 85)}


def test_every_test_that_the_list_names_exists() -> None:
    assert not set().union(*listed().values()) - written()


def test_every_test_that_names_a_row_of_the_list_stands_in_it() -> None:
    rows = listed()
    missing = [(row, name) for name in written() for row in rows_of(name) if name not in rows.get(row, {name})]
    assert not missing


def test_every_row_has_a_test_or_a_reason_why_not() -> None:
    _, _, untested = (HERE / "README.md").read_text().partition("\n## No test yet\n")
    reasons = {row for cell in re.findall(r"^\| ([\d, ]+) \|", untested, re.M) for row in numbers(cell)}
    tested = {row for row, names in listed().items() if names}
    assert not WANTED - tested - reasons
    assert not tested & reasons


def listed() -> dict[int, set[str]]:
    """The tests of each row."""
    lines = re.findall(r"^\| (\d+) \|.*\| (`.*) \|$", (HERE / "README.md").read_text(), re.M)
    return {int(row): set(re.findall(r"`(test_\w+)`", names)) for row, names in lines}


def written() -> set[str]:
    return {name for file in HERE.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}


def rows_of(name: str) -> Iterable[int]:
    """`test_rows_69_70_and_75_...` is of three."""
    named = re.match(r"test_rows?_((?:(?:and_)?\d+_)+)", name)
    return numbers(named[1]) if named else ()


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
