from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.files import replace_text


class Killed(Exception):
    """The process ends here."""


def test_a_text_that_dies_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    replace_text(path, "old")
    replace_text(path, "older no more")
    assert path.read_text() == "older no more"

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        replace_text(path, "half of the new")
    assert path.read_text() == "older no more"
