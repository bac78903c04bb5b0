"""What the Dockerfile says, as far as it can be read without building it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass
class Stage:
    """`FROM parent AS name`, and its instructions in order."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for given, rest in self.instructions if given == instruction]


def read_stages() -> dict[str, Stage]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, Stage] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stages[name] = Stage(name, parent)
        elif stages and instruction:
            list(stages.values())[-1].instructions.append((instruction, rest.strip()))
    return stages


STAGES = read_stages()
TARGETS = ("cpu", "cuda", "training")


def lineage(name: str) -> list[Stage]:
    """The stage and those that it stands on, the first of them first."""
    if name not in STAGES:
        return []
    return [*lineage(STAGES[name].parent), STAGES[name]]


def said(name: str, instruction: str) -> list[str]:
    """All that the image of a stage has of one instruction."""
    return [rest for stage in lineage(name) for rest in stage.all(instruction)]


def environment(name: str) -> dict[str, str]:
    return dict(word.split("=", 1) for rest in said(name, "ENV") for word in shlex.split(rest))


def test_the_default_is_the_service_on_a_cpu() -> None:
    assert set(TARGETS) <= set(STAGES)
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_root_and_nothing_is_built_where_it_runs(target: str) -> None:
    assert said(target, "USER") == ["10001:10001"]
    assert json.loads(said(target, "ENTRYPOINT")[-1]) == ["python", "-m"]
    module = json.loads(said(target, "CMD")[-1])[0]
    assert find_spec(f"{module}.__main__")
    runs = " ".join(said(target, "RUN"))
    assert not re.search(r"\b(apt|apt-get|pip|gcc|make)\b", runs)
    assert all("--from=build" not in rest or "/opt/clarifier" in rest for rest in said(target, "COPY"))
    assert environment(target)["PATH"].startswith("/opt/clarifier/bin:")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_serves_says_when_it_is_ready(target: str) -> None:
    assert said(target, "EXPOSE") == [str(Settings.model_fields["port"].default)]
    assert said(target, "STOPSIGNAL") == ["SIGTERM"]
    (check,) = said(target, "HEALTHCHECK")
    program, option, code = json.loads(check.partition(" CMD ")[2])
    assert (program, option) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert f"127.0.0.1:{said(target, 'EXPOSE')[0]}/readyz" in code


@pytest.mark.parametrize("target", TARGETS)
def test_every_name_of_the_environment_is_a_setting(target: str) -> None:
    given = {name.removeprefix(PREFIX).lower(): value for name, value in environment(target).items() if PREFIX in name}
    assert set(given) <= set(Settings.model_fields)
    Settings.model_validate(given)


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_an_image_holds(target: str) -> None:
    labels = dict(word.split("=", 1) for rest in said(target, "LABEL") for word in shlex.split(rest))
    named = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert set(named) == {"title", "description", "licenses", "version", "revision"}
    assert named["licenses"] == PROJECT["license"]
    assert f"VERSION={PROJECT['version']}" in said(target, "ARG")


def test_what_is_installed_is_pinned_and_named_in_the_project() -> None:
    for name in ("build-cpu", "build-cuda", "build-training"):
        runs = " ".join(STAGES[name].all("RUN"))
        for install in re.findall(r"install (.*?)(?:&&|$)", runs):
            assert "--constraint requirements.lock" in install or "'^torch==[^ ]*' requirements.lock" in install
        extras = [extra for group in re.findall(r"'\.\[([\w,]+)\]'", runs) for extra in group.split(",")]
        assert extras
        assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_all_that_is_copied_is_there_and_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {
        source
        for stage in STAGES.values()
        for rest in stage.all("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == set(sent)
    assert all((ROOT / source).exists() for source in sent)


def test_a_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
