"""What an engine needs before it can run: bundles loaded from the model repository, and warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.batching import RunBatch
from service.repository import Catalog, load_repository, warm_bundles
from service.settings import PREFIX, Settings, SettingsError

MISCONFIGURED = 2
"""What a process exits with if a setting stops its start."""
ENGINE_DIED = 70
"""And if its engine ends by itself: EX_SOFTWARE of BSD's sysexits."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading gives: bundles to describe, and an engine that is warm."""

    catalog: Catalog
    run_batch: RunBatch
    engine: str
    """Its name, for metrics."""
    device: str
    memory_bytes: Callable[[], float]


def load_engine(settings: Settings) -> Loaded:
    """Load the model repository and warm it up, in this process with torch. Takes seconds."""
    from models import Bundle, load_bundle
    from service.engine import Engine, choose_device

    device = choose_device(settings.device)

    def load(path: Path) -> Bundle:
        bundle = load_bundle(path, device=device)
        bundle.record()
        return bundle

    bundles, refused = load_repository(settings.model_repository, load, settings.max_image_pixels)
    # An accelerator is tuned for full batches too; on a CPU a full batch of a slow defense takes seconds.
    largest = settings.max_batch_size if device.type == "cuda" else min(4, settings.max_batch_size)
    sizes = sorted({1, largest})
    bundles, cold = warm_bundles(bundles, lambda name, bundle: Engine({name: bundle}, device).warm(sizes))
    engine = Engine(bundles, device)
    return Loaded(Catalog(bundles, [*refused, *cold]), engine.run, "torch", str(device), engine.memory_bytes)


def check_repository(settings: Settings) -> None:
    """Raises SettingsError if there is no such directory; an empty one may be filled before the next start."""
    if not settings.model_repository.is_dir():
        raise SettingsError(f"{PREFIX}MODEL_REPOSITORY: {settings.model_repository} is not a directory")


def check_device(settings: Settings) -> None:
    """Raises SettingsError if a CUDA device is required and absent."""
    if settings.device.startswith("cuda"):
        from service.engine import DeviceUnavailable, choose_device

        try:
            choose_device(settings.device)
        except DeviceUnavailable as error:
            raise SettingsError(str(error)) from None
