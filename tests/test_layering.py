"""The folder is the architecture: training → models ← service, and nothing between the two.

Imports inside functions count too. What passes between `training` and `service` is a bundle on disk.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WEB = {"fastapi", "prometheus_client", "redis", "starlette", "uvicorn"}
OFFLINE = {"datasets", "foolbox", "scipy", "tensorboard", "tqdm"}  # the service is installed without them
OUTER = {"benchmarks", "monitoring", "tests"}

FORBIDDEN = {
    "models": {"torchvision", "training", "service", "argparse"} | WEB | OFFLINE | OUTER,
    "training": {"torchvision", "service"} | WEB | OUTER,
    "service": {"torchvision", "training"} | OFFLINE | OUTER,
    "benchmarks": {"torchvision", "tests"},
    "monitoring": {"torchvision", "models", "training", "service", "benchmarks", "tests"} | WEB | OFFLINE,
    "tests": {"torchvision"},
}


def imported_packages(source: str) -> set[str]:
    """The top-level packages that Python source imports, wherever it does so."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


def offenses(package: str, source: str) -> set[str]:
    """What source in this package of ours imports although it must not."""
    return imported_packages(source) & FORBIDDEN[package]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nothing_imports_against_the_arrows(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not offenses(package, path.read_text(encoding="utf-8")), path


def test_every_folder_with_code_has_its_arrows() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert "models" in folders
    assert folders <= set(FORBIDDEN)


@pytest.mark.parametrize(
    ("package", "source", "offense"),
    [
        ("models", "import service.settings as settings", "service"),
        ("models", "from fastapi.responses import Response", "fastapi"),
        ("training", "def export():\n    from service import app", "service"),
        ("service", "if TYPE_CHECKING:\n    from training import recipes", "training"),
        ("service", "import os, foolbox", "foolbox"),
        ("benchmarks", "from torchvision import transforms", "torchvision"),
    ],
)
def test_an_import_against_the_arrows_is_seen(package: str, source: str, offense: str) -> None:
    assert offenses(package, source) == {offense}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("training", "from models import load_bundle"),
        ("service", "from models.bundle import Bundle\nimport fastapi"),
        ("models", "from . import service\nimport torch"),  # a module of its own that shares the name
        ("benchmarks", "import models, service, training"),
    ],
)
def test_an_import_along_the_arrows_is_allowed(package: str, source: str) -> None:
    assert not offenses(package, source)
