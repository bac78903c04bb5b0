from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.parent for path in (ROOT / "models/bundles").glob("*/*/bundle.json"))
BLOCKS = [
    pytest.param(block, id=f"{page}-{index}")
    for page in ("README.md", "models/README.md")
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]


def test_there_is_python_to_run() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_of_the_documentation_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    exec(compile(block, "documentation", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "models/README.md"])
def test_every_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())

    assert all(((ROOT / page).parent / link).exists() for link in links)


def test_every_shipped_bundle_has_a_table() -> None:
    assert len(SHIPPED) == (ROOT / "README.md").read_text().count("\nThe shipped bundle `")


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.parent.name)
def test_the_accuracy_table_is_the_report_of_the_shipped_bundle(directory: Path) -> None:
    report = json.loads((directory / "report.json").read_text())
    _, _, after = (ROOT / "README.md").read_text().partition(f"\nThe shipped bundle `{directory.parent.name}@")
    section = re.split("\n## |\nThe shipped bundle `", after)[0]
    rows = {"undefended": report["undefended"], **report["defenses"], **report["grey_box_only"]}
    printed = dict(re.findall(r"^\| `?([a-z0-9:,]+)`? \| (\d.*) \|$", section, re.MULTILINE))

    assert printed.keys() == rows.keys()
    for name, row in rows.items():
        cells = [row["standard"], row["grey_box"]["fgsm"], row["grey_box"]["pgd20"]]
        expected = [f"{100 * cell['accuracy']:.1f} ± {half_width(cell):.1f}" for cell in cells]
        assert printed[name] == " | ".join([*expected, f"{row['cost']:.1f} ×"])


def half_width(cell: dict[str, Any]) -> float:
    low, high = cell["interval"]
    return float(100 * (high - low) / 2)
