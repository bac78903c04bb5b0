"""A bundle on disk: what training hands to the service.

A bundle is a directory of `bundle.json`, safetensors weights and `report.json`. Nothing in it is ever unpickled,
and nothing of it is used before every file's hash and every tensor's name and shape have been checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from models.aid import AidDiscriminator, tap_channels
from models.atop import build_inpainter
from models.bundle import Bundle, BundleError
from models.classifiers import build_classifier
from models.files import replace_text
from models.manifest import Manifest

MANIFEST = "bundle.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
# JSON of a bundle is a few kilobytes; a file far beyond that is not one of ours.
MAX_JSON_BYTES = 4 * 1024 * 1024


def load_bundle(directory: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load a bundle onto a device, in float32.

    Raises BundleError, with the file's name and the reason, for anything that is missing, altered, of another
    shape, not finite, or of a schema that this version does not know.
    """
    directory = Path(directory)
    manifest_bytes = _read_json_bytes(directory, MANIFEST)
    manifest = _validated(manifest_bytes)
    _check_files(directory, manifest)
    parts = _build_parts(manifest)
    for name, part in parts.items():
        _load_weights(directory, f"{name}.safetensors", part, manifest)
        part.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Bundle(
        manifest,
        parts["classifier"],  # type: ignore[arg-type]
        inpainter=parts.get("atop"),
        discriminator=parts.get("aid"),  # type: ignore[arg-type]
        report=_read_report(directory) if REPORT in manifest.files else None,
        digest=hashlib.sha256(manifest_bytes).hexdigest(),
    )


def check_bundle(directory: str | Path) -> str:
    """The digest of a bundle whose files are as `bundle.json` states; raises BundleError as `load_bundle` does.

    Nothing is loaded: whoever has loaded a bundle of this digest has what is there.
    """
    directory = Path(directory)
    manifest_bytes = _read_json_bytes(directory, MANIFEST)
    _check_files(directory, _validated(manifest_bytes))
    return hashlib.sha256(manifest_bytes).hexdigest()


def read_manifest(directory: str | Path) -> Manifest:
    """What a bundle says of itself, without its weights; raises BundleError as `load_bundle` does."""
    return _validated(_read_json_bytes(Path(directory), MANIFEST))


def _validated(manifest_bytes: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(manifest_bytes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise BundleError(f"{MANIFEST}: {where}: {first['msg']}") from error


def save_bundle(bundle: Bundle, directory: str | Path) -> None:
    """Write a bundle: weights as float16, the hashes of all files, and `bundle.json` last.

    Raises BundleError if the directory already holds a bundle: a version, once written, does not change.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        raise BundleError(f"{directory} already holds a bundle; export it as a new version")
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"classifier": bundle.classifier, "atop": bundle.inpainter, "aid": bundle.discriminator}
    files = dict[str, str]()
    for name, part in parts.items():
        if part is not None:
            path = directory / f"{name}.safetensors"
            safetensors.torch.save_file(_half(part.state_dict()), path)
            path.chmod(0o644)  # safetensors makes files for their owner alone; a service runs as somebody else
            files[path.name] = _sha256(path)
    _write_manifest(directory, bundle.manifest.model_copy(update={"files": files}))


def write_report(directory: str | Path, report: Mapping[str, object], page: str) -> None:
    """Put a report and its page for people into a bundle, in place of earlier ones, and their hashes into bundle.json.

    Whenever this is interrupted the bundle stays sound, if without a report. Nothing else of bundle.json changes, also
    where it was written by an older version.
    """
    directory = Path(directory)
    files = {name: sha for name, sha in read_manifest(directory).files.items() if name not in (REPORT, REPORT_PAGE)}
    _list_files(directory, files)
    for name, text in ((REPORT, json.dumps(report, indent=1) + "\n"), (REPORT_PAGE, page)):
        replace_text(directory / name, text)
        files[name] = _sha256(directory / name)
    _list_files(directory, files)


def _list_files(directory: Path, files: Mapping[str, str]) -> None:
    told = json.loads((directory / MANIFEST).read_text())
    replace_text(directory / MANIFEST, json.dumps({**told, "files": files}, indent=1, ensure_ascii=False) + "\n")


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    replace_text(directory / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def _half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu() for name, value in state.items()
    }


def _build_parts(manifest: Manifest) -> dict[str, nn.Module]:
    height, width = manifest.input_size
    if height != width:
        raise BundleError(f"{MANIFEST}: input_size: this version knows square inputs only, not {height}x{width}")
    try:
        spec = manifest.classifier
        classifier = build_classifier(
            spec.architecture, num_classes=len(manifest.classes), input_size=height, mirrored=spec.mirrored
        )
        parts: dict[str, nn.Module] = {"classifier": classifier}
        if manifest.defenses.atop is not None:
            parts["atop"] = build_inpainter(manifest.defenses.atop.inpainter)
        if (aid := manifest.defenses.aid) is not None:
            channels = tap_channels(classifier.eval(), aid.taps, manifest.input_size)
            parts["aid"] = AidDiscriminator(aid, channels)
        if (zeropur := manifest.defenses.zeropur) is not None:
            for preset in zeropur.presets.values():
                classifier.refuse_unknown(preset.layers)
    except (ValueError, KeyError) as error:
        raise BundleError(f"{MANIFEST}: {error.args[0]}") from error
    return parts


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = directory / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise BundleError(f"{name}: missing, or not a plain file inside the bundle")
        if _sha256(path) != expected:
            raise BundleError(f"{name}: its sha256 is not the one that {MANIFEST} states")


def _load_weights(directory: Path, name: str, part: nn.Module, manifest: Manifest) -> None:
    if name not in manifest.files:
        raise BundleError(f"{name}: {MANIFEST} lists no such file")
    try:
        state = safetensors.torch.load_file(directory / name)
    except SafetensorError as error:
        raise BundleError(f"{name}: not a whole safetensors file") from error
    expected = part.state_dict()
    if state.keys() != expected.keys():
        differing = sorted(state.keys() ^ expected.keys())
        raise BundleError(f"{name}: tensors missing or unexpected: {', '.join(differing[:3])}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise BundleError(f"{name}: {key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}")
        if not bool(value.isfinite().all()):
            raise BundleError(f"{name}: {key} holds values that are not finite")
    part.load_state_dict(state)


def _read_json_bytes(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{name}: larger than {MAX_JSON_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror})") from error


def _read_report(directory: Path) -> dict[str, object]:
    content = _read_json_bytes(directory, REPORT)
    try:
        report = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{REPORT}: not JSON") from error
    if not isinstance(report, dict):
        raise BundleError(f"{REPORT}: not a JSON object")
    return report


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
