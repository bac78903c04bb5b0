"""The model repository on disk, `<name>/<version>/`, becomes a catalog of bundles that are sound."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from models.manifest import Manifest
from service.errors import UnknownModel
from service.schemas import DefenseInfo, ModelInfo, Refusal
from service.work import EngineFault

logger = logging.getLogger(__name__)

REMEMBERED_CHAINS = 1024
REMEMBERED_QUESTIONS = 1024

PICKLES = (".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".mar")
"""Files that can run code when they are read. They are never opened."""

FAILURES = (EngineFault, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
"""What a network that does not fit its bundle, or a device that cannot hold it, raises at its first run."""


class DescribedBundle(Protocol):
    """What a gateway needs of a bundle: not its networks."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def digest(self) -> str: ...

    @property
    def report(self) -> Mapping[str, object]: ...


B = TypeVar("B", bound=DescribedBundle)
R = TypeVar("R")
Asked = TypeVar("Asked", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Chain:
    """What a bundle's manifest says about a defense that clients ask for."""

    defense: str
    """Canonical, as `Manifest.resolve` writes it."""
    steps: frozenset[str]
    """The names of its defenses."""
    is_random: bool


class Catalog:
    """The bundles that are loaded, and those that were refused."""

    def __init__(self, bundles: Mapping[str, DescribedBundle], refused: Sequence[Refusal] = ()) -> None:
        self.bundles = dict(bundles)
        self.refused = tuple(refused)
        self.chain = lru_cache(REMEMBERED_CHAINS)(self._chain)
        """(`name@version` of a bundle, a chain or None for its default) to Chain. Raises UnknownDefense."""
        self._memo = lru_cache(REMEMBERED_QUESTIONS)(lambda function, asked: function(self, asked))

    def memoized(self, function: Callable[[Catalog, Asked], R], asked: Asked) -> R:
        """What `function` makes of this catalog and what is asked of it: most requests ask the same."""
        result: R = self._memo(function, asked)
        return result

    def _chain(self, name: str, wanted: str | None) -> Chain:
        manifest = self.bundles[name].manifest
        defense = manifest.resolve(manifest.default_defense if wanted is None else wanted)
        steps = frozenset(step for step, _ in manifest.chain(defense))
        return Chain(defense, steps, manifest.is_random(defense))

    def find(self, name: str) -> tuple[str, DescribedBundle]:
        """`name@version` and bundle of `name` (its newest version) or `name@version`. Raises UnknownModel."""
        if name in self.bundles:
            return name, self.bundles[name]
        versions = [key for key in self.bundles if _name_and_version(key)[0] == name]
        if not versions:
            raise UnknownModel(f"loaded are {', '.join(sorted(self.bundles)) or 'none'}")
        newest = max(versions, key=_name_and_version)
        return newest, self.bundles[newest]

    @property
    def digests(self) -> dict[str, str]:
        """By `name@version`."""
        return {name: bundle.digest for name, bundle in self.bundles.items()}

    def describe(self, name: str) -> list[ModelInfo]:
        """The versions of a model, oldest first; one if `name` names a version. Raises UnknownModel."""
        self.find(name)
        return [info for key, info in self._all() if name in (key, info.name)]

    def describe_all(self) -> list[ModelInfo]:
        """Every version of every model."""
        return [info for _, info in self._all()]

    def _all(self) -> Iterator[tuple[str, ModelInfo]]:
        for key in sorted(self.bundles, key=_name_and_version):
            yield key, _info(self.bundles[key])


def name_of(bundle: DescribedBundle) -> str:
    """`name@version`."""
    return f"{bundle.manifest.name}@{bundle.manifest.version}"


def _name_and_version(key: str) -> tuple[str, int]:
    name, _, version = key.rpartition("@")
    return name, int(version)


def load_repository(
    directory: Path, load: Callable[[Path], B], max_image_pixels: int
) -> tuple[dict[str, B], list[Refusal]]:
    """Every bundle below `directory` that `load` accepts, by `name@version`, and a refusal for each other.

    `load` refuses with a ValueError that says why.
    """
    bundles = dict[str, B]()
    refused = list[Refusal]()
    for path in _bundle_directories(directory):
        place = f"{path.parent.name}/{path.name}"
        started = time.monotonic()
        try:
            bundle = load(path)
            _check(bundle.manifest, path, max_image_pixels)
        except (ValueError, OSError) as error:
            logger.error("bundle %s is refused: %s", place, error)
            refused.append(Refusal(bundle=place, reason=_first_line(error)))
            continue
        bundles[f"{path.parent.name}@{path.name}"] = bundle
        logger.info("bundle %s (%.12s) is in memory after %.1f s", place, bundle.digest, time.monotonic() - started)
    return bundles, refused


def warm_bundles(bundles: Mapping[str, B], warm: Callable[[str, B], None]) -> tuple[dict[str, B], list[Refusal]]:
    """The bundles that `warm` can run, and a refusal for each other: one that fails does not stop the others."""
    sound = dict[str, B]()
    refused = list[Refusal]()
    for name, bundle in bundles.items():
        try:
            warm(name, bundle)
        except FAILURES as error:
            logger.error("bundle %s is refused: it cannot run", name, exc_info=error)
            refused.append(Refusal(bundle=name.replace("@", "/"), reason="it failed when it was first run"))
            continue
        sound[name] = bundle
    return sound, refused


def renew_repository(
    directory: Path,
    load: Callable[[Path], B],
    check: Callable[[Path], str],
    warm: Callable[[str, B], None],
    max_image_pixels: int,
    before: Mapping[str, B],
) -> tuple[dict[str, B], list[Refusal]]:
    """The bundles to serve, all warm, and a refusal for each that is not sound; `before` are those served until now.

    One whose digest, as `check` gives it, is the same is taken as it is; so is one that can no longer be loaded or
    warmed. One whose directory is gone is left out.
    """

    def load_what_is_new(path: Path) -> B:
        known = before.get(f"{path.parent.name}@{path.name}")
        return known if known is not None and check(path) == known.digest else load(path)

    there, refused = load_repository(directory, load_what_is_new, max_image_pixels)
    old = {name: bundle for name, bundle in there.items() if before.get(name) is bundle}
    warmed, cold = warm_bundles({name: there[name] for name in there if name not in old}, warm)
    refused += cold
    for name in (refusal.bundle.replace("/", "@") for refusal in refused):
        if name in before:
            logger.error("bundle %s goes on as it was loaded before", name)
            old[name] = before[name]
    return old | warmed, refused


def _bundle_directories(directory: Path) -> list[Path]:
    """Where bundles are; warns about files that nobody should put there."""
    if not directory.is_dir():
        logger.error("the model repository %s is not a directory", directory)
        return []
    for path in sorted(directory.rglob("*")):
        if path.suffix in PICKLES:
            logger.warning("%s is ignored: bundles hold safetensors only", path)
    return sorted(path for path in directory.glob("*/*") if path.is_dir())


def _check(manifest: Manifest, path: Path, max_image_pixels: int) -> None:
    if (manifest.name, manifest.version) != (path.parent.name, path.name):
        raise ValueError(f"it says it is {manifest.name} {manifest.version}")
    height, width = manifest.input_size
    if height * width > max_image_pixels:
        raise ValueError(f"its input of {height} × {width} is larger than CLARIFIER_MAX_IMAGE_PIXELS")


def _first_line(error: Exception) -> str:
    """Without the system's own words: they may hold paths."""
    return "it cannot be read" if isinstance(error, OSError) else str(error).partition("\n")[0]


def _info(bundle: DescribedBundle) -> ModelInfo:
    manifest = bundle.manifest
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        digest=bundle.digest,
        classes=list(manifest.classes),
        input_size=manifest.input_size,
        default_defense=manifest.resolve(manifest.default_defense),
        defenses={
            name: DefenseInfo(
                default_preset=spec.default_preset,
                presets={preset: settings.model_dump() for preset, settings in spec.presets.items()},
            )
            for name, spec in manifest.defenses.offered().items()
        },
        aid_threshold=manifest.aid_threshold,
        report=dict(bundle.report),
    )
