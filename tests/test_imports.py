"""Importing Clarifier only defines names: it needs no torchvision, and says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "training", "service", "benchmarks")
ELSEWHERE = "benchmarks.peers.servers."
"""Scripts of other servers, which run in environments of their own."""

IMPORT_ALL = """
import importlib, sys
sys.modules["torchvision"] = None  # from here on, importing it raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def modules_of(package: str) -> list[str]:
    """The dotted names of all modules in one package of ours, `__main__` among them."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def import_in_fresh_process(modules: list[str], folder: Path) -> tuple[int, str]:
    """Import modules one after the other, torchvision blocked: the exit status, and all that was printed."""
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    result = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return result.returncode, result.stdout


def test_every_module_imports_without_torchvision_and_prints_nothing() -> None:
    modules = [name for package in PACKAGES for name in modules_of(package) if not name.startswith(ELSEWHERE)]
    assert "models.classifiers" in modules
    status, output = import_in_fresh_process(modules, ROOT)
    assert status == 0, output
    assert output == ""


def test_a_module_that_needs_torchvision_is_caught(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("from torchvision.transforms import Resize")
    status, output = import_in_fresh_process(["needy"], tmp_path)
    assert status == 1
    assert "needy.py" in output


def test_a_module_that_prints_is_caught(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text("import os; os.write(2, b'ready')")
    assert import_in_fresh_process(["chatty"], tmp_path) == (0, "ready")
