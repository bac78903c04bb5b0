"""What a defense is: classifiers, transforms, purifiers, and bundles of them. Tensors in, tensors out.

The names that need torch are imported at their first use, so that a process which only reads manifests (a gateway)
never loads it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from models.manifest import Manifest, UnknownDefense

if TYPE_CHECKING:
    from models.bundle import Bundle, BundleError
    from models.bundle_files import check_bundle, load_bundle, save_bundle, write_report
    from models.defense import DefendedClassifier

_NEED_TORCH = {
    "Bundle": "models.bundle",
    "BundleError": "models.bundle",
    "check_bundle": "models.bundle_files",
    "load_bundle": "models.bundle_files",
    "save_bundle": "models.bundle_files",
    "write_report": "models.bundle_files",
    "DefendedClassifier": "models.defense",
}

__all__ = [
    "Bundle",
    "BundleError",
    "DefendedClassifier",
    "Manifest",
    "UnknownDefense",
    "check_bundle",
    "load_bundle",
    "save_bundle",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEED_TORCH[name]), name)
