"""What an evaluation has found so far, on disk, so that a killed one goes on where it was.

A finding is kept under everything that it depends on. Numbers therefore never mix: with other weights, images, seeds or
settings the key is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from models.files import replace_text


def key_of(depends_on: Mapping[str, object]) -> str:
    """The name of a finding: sha256 of what it depends on, as JSON."""
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Progress:
    """Findings in `<directory>/findings.jsonl`, one line each, and adversarial images that several defenses share."""

    def __init__(self, directory: Path) -> None:
        """Read what is there; a line that a kill cut short is dropped."""
        self.directory = directory
        self._lines = directory / "findings.jsonl"
        self._found = dict[str, dict[str, Any]]()
        directory.mkdir(parents=True, exist_ok=True)
        if self._lines.exists():
            lines = self._lines.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) < len(lines):
                replace_text(self._lines, "".join(whole))
            self._found = {entry["key"]: entry for entry in map(json.loads, whole)}

    def find(self, depends_on: Mapping[str, object]) -> dict[str, Any] | None:
        """The finding, if it was made before."""
        return self._found.get(key_of(depends_on))

    def add(self, depends_on: Mapping[str, object], finding: Mapping[str, object]) -> dict[str, Any]:
        """Keep a finding; returns it as `find` will."""
        key = key_of(depends_on)
        entry = {"key": key, **finding, "of": depends_on}
        with self._lines.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        self._found[key] = entry
        return entry

    def images(self, depends_on: Mapping[str, object]) -> Tensor | None:
        """Adversarial images that were kept."""
        path = self._images_path(depends_on)
        return safetensors.torch.load_file(path)["images"] if path.exists() else None

    def keep_images(self, depends_on: Mapping[str, object], images: Tensor) -> None:
        """Keep adversarial images for the next defense."""
        path = self._images_path(depends_on)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        safetensors.torch.save_file({"images": images.contiguous()}, unfinished)
        unfinished.replace(path)

    def _images_path(self, depends_on: Mapping[str, object]) -> Path:
        return self.directory / "images" / f"{key_of(depends_on)}.safetensors"
