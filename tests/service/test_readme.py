"""The list of rows names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_list_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text())
    written = {name for file in HERE.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 60
    assert not set(named) - written
