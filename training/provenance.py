"""Where a number comes from: weights, bundle, commit, library versions, machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

LIBRARIES = ("torch", "numpy", "safetensors", "kornia", "foolbox", "pyautoattack", "datasets")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over the names and values of a network's state: equal for equal networks, wherever they are."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def content_sha256(bundle_json: bytes) -> str:
    """Of all that decides a bundle's answers: networks, weights and presets, but not its report or provenance."""
    told = json.loads(bundle_json)
    told.pop("provenance", None)
    told["files"] = {name: sha256 for name, sha256 in told["files"].items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of the libraries that a number can depend on."""
    return {name: version(name) for name in LIBRARIES}


def git_commit() -> str:
    """The commit of the code, with `+changes` where the working tree differs from it; `unknown` outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def hardware() -> dict[str, object]:
    """The machine: its processor, how many threads torch uses, its GPU if it has one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "gpu": gpu, "python": platform.python_version()}


def cpu_model() -> str:
    """The processor's name as Linux gives it, or the architecture elsewhere."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
