"""A bundle on disk: what training hands to the service, and the three lines that use it from Python.

A bundle is a directory of `bundle.json`, safetensors weights and `report.json`. Nothing in it is ever unpickled,
and nothing of it is used before every file's hash and every tensor's name and shape have been checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from models.aid import Aid, AidDiscriminator, AidPurifier, tap_channels
from models.atop import AtopPurifier, build_inpainter
from models.classifiers import Classifier, build_classifier
from models.defense import DefendedClassifier, Purifier, Seed
from models.files import replace_text
from models.gate import DecidedGate, GatePurifier
from models.manifest import AidSpec, AtopSpec, AutoSpec, Manifest, ZeroPurSpec
from models.packed import packed_twin
from models.recorded import record_forward
from models.zeropur import ZeroPurPurifier

MANIFEST = "bundle.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
# JSON of a bundle is a few kilobytes; a file far beyond that is not one of ours.
MAX_JSON_BYTES = 4 * 1024 * 1024


class BundleError(ValueError):
    """A bundle that is refused; the message is one sentence that names the file and the reason."""


class Bundle:
    """A loaded bundle: a frozen classifier and its defenses, on one device, in eval mode.

    `classifier`, `inpainter` and `discriminator` are the networks as they are; the defenses run twins of them that
    share their weights and keep them packed (see `models.packed`).
    """

    def __init__(
        self,
        manifest: Manifest,
        classifier: Classifier,
        *,
        inpainter: nn.Module | None = None,
        discriminator: AidDiscriminator | None = None,
        report: Mapping[str, object] | None = None,
        digest: str = "",
    ) -> None:
        """Put the parts of `manifest` together. `digest` is the sha256 of bundle.json, empty if never saved."""
        self.manifest, self.classifier, self.digest = manifest, classifier, digest
        self.report = dict(report or {})
        self.inpainter, self.discriminator = inpainter, discriminator
        for part in (classifier, inpainter, discriminator):
            if part is not None:
                part.eval().requires_grad_(False)
        self._classifier_twin = packed_twin(classifier)
        self._inpainter_twin = None if inpainter is None else packed_twin(inpainter)
        self._recorded_purifiers: dict[tuple[str, str], Purifier] | None = None
        aid = manifest.defenses.aid
        self.aid: Aid | None = None
        if aid is not None and discriminator is not None:
            self.aid = Aid(self._classifier_twin, discriminator, aid.taps).eval()

    def record(self) -> None:
        """Have what the networks do to single images on a CPU recorded, for a seventh less time and with the same bits.

        For a bundle that serves: its networks, also those that `defended` hands out, must not be changed any more, nor
        may hooks be put on them. See `models.recorded`.
        """
        if self._recorded_purifiers is None:
            self._recorded_purifiers = {}
            for network in (self._classifier_twin, self._inpainter_twin, self.aid):
                if network is not None:
                    record_forward(network)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return self.manifest.classes

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.manifest.input_size

    @property
    def default_defense(self) -> str:
        """The chain that answers a request which names none."""
        return self.manifest.default_defense

    def defended(self, defense: str, votes: int = 1, seed: Seed = None) -> DefendedClassifier:
        """The classifier behind a chain such as `atop`, `zeropur:coarse` or `atop,aid`; see `DefendedClassifier`.

        Raises UnknownDefense for a chain that the bundle does not offer.
        """
        return self._behind(self._chain(defense), votes, seed)

    def _behind(self, chain: Sequence[Purifier], votes: int, seed: Seed) -> DefendedClassifier:
        defended = DefendedClassifier(self._classifier_twin, chain, votes=votes, seed=seed)
        if self._recorded_purifiers is None:
            return defended.eval()
        for new in (defended, defended.chain, *defended.chain):  # all below stays in eval mode: to walk it takes long
            new.training = False
        return defended

    def _chain(self, defense: str) -> list[Purifier]:
        return [self._purifier(name, preset) for name, preset in self.manifest.chain(defense)]

    def _purifier(self, name: str, preset: str) -> Purifier:
        """A new one, or the one that keeps the recordings."""
        if self._recorded_purifiers is None:
            return self._new_purifier(name, preset)
        if (name, preset) not in self._recorded_purifiers:
            purifier = self._new_purifier(name, preset)
            if isinstance(purifier, AidPurifier | ZeroPurPurifier):
                purifier.record()
            assert isinstance(purifier, nn.Module)
            purifier.eval()
            self._recorded_purifiers[name, preset] = purifier
        return self._recorded_purifiers[name, preset]

    def _new_purifier(self, name: str, preset: str) -> Purifier:
        spec = self.manifest.defenses.offered()[name]
        match spec:
            case AtopSpec() if self._inpainter_twin is not None:
                return AtopPurifier(self._inpainter_twin, spec.presets[preset])
            case AidSpec() if self.aid is not None:
                return AidPurifier(self.aid, spec.presets[preset])
            case ZeroPurSpec():
                return ZeroPurPurifier(self._classifier_twin, spec.presets[preset])
            case AutoSpec() if self.aid is not None:
                gate = spec.presets[preset]
                cheap, strong = self._chain(gate.cheap), self._chain(gate.strong)
                return GatePurifier(self.aid, gate.threshold, cheap=cheap, strong=strong)
        raise BundleError(f"bundle {self.manifest.name} offers {name} but was put together without its network")

    @torch.no_grad()
    def purify(self, defense: str, images: Tensor, seed: Seed = None, ran: Sequence[str] | None = None) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] after the chain; same shape and range. No gradient is kept.

        `ran` tells `auto` which of its two chains to run for each image, so that it does not score them: what the
        method of that name said, or another choice.
        """
        defended = self._decided(defense, images, 1, seed, ran)
        return defended.purify(images, defended.seeds_for(images))

    @torch.no_grad()
    def probabilities(
        self, defense: str, images: Tensor, votes: int = 1, seed: Seed = None, ran: Sequence[str] | None = None
    ) -> Tensor:
        """Probabilities (N, K) behind the chain, averaged over `votes` draws. No gradient is kept.

        `ran` as in `purify`.
        """
        logits: Tensor = self._decided(defense, images, votes, seed, ran)(images)
        return logits.softmax(1)

    def _decided(
        self, defense: str, images: Tensor, votes: int, seed: Seed, ran: Sequence[str] | None
    ) -> DefendedClassifier:
        """As `defended`; where `ran` says so, `auto` runs these chains for `images`."""
        preset = None if ran is None else self.manifest.gate(defense)
        if ran is None or preset is None:
            return self.defended(defense, votes=votes, seed=seed)
        (gate,) = self._chain(defense)
        assert isinstance(gate, GatePurifier)
        suspects = torch.tensor([chain == preset.strong for chain in ran], device=images.device)
        return self._behind([DecidedGate(gate, suspects)], votes, seed)

    @torch.no_grad()
    def ran(self, defense: str, images: Tensor) -> list[str]:
        """For every image (N, 3, H, W), the chain that `auto` chooses for it; any other defense is itself."""
        preset = self.manifest.gate(defense)
        if preset is None:
            return [defense] * len(images)
        (gate,) = self._chain(defense)
        assert isinstance(gate, GatePurifier)
        return [preset.strong if suspect else preset.cheap for suspect in gate.suspects(images).tolist()]

    @torch.no_grad()
    def aid_score(self, images: Tensor) -> Tensor:
        """(N,) in [0, 1]: 1 natural, 0 adversarial. Raises BundleError if the bundle has no AID."""
        if self.aid is None:
            raise BundleError(f"bundle {self.manifest.name} has no AID discriminator")
        score: Tensor = self.aid(images)
        return score


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
