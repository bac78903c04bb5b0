"""requirements.lock pins what pyproject.toml asks for, and says nothing about where to get it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def declared() -> list[Requirement]:
    """The requirements in pyproject.toml: those of `models`, then those of every group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def pinned() -> dict[str, str]:
    """What the lock pins: names and the versions after `==`, as they are written."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].strip().partition("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pins = pinned()
    for requirement in declared():
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock: run make lock"
        assert requirement.specifier.contains(version), f"{requirement} is pinned at {version}: run make lock"


def test_the_lock_holds_plain_public_versions_only() -> None:
    for name, version in pinned().items():
        assert name.replace("-", "").isalnum(), name  # no option, address or path
        assert Version(version).public == version, f"{name} is pinned at a local build"


def test_the_lock_has_the_tested_torch_and_no_torchvision() -> None:
    pins = pinned()
    assert pins["torch"] == "2.13.0"
    assert "torchvision" not in pins
