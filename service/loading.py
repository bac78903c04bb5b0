"""What an engine needs before it can run: bundles loaded from the model repository, and warm."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from service.batching import RunBatch
from service.repository import Catalog, DescribedBundle, renew_repository
from service.schemas import Refusal
from service.settings import PREFIX, Settings, SettingsError
from service.work import Key, Pixels, Ran

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=DescribedBundle)
B_contra = TypeVar("B_contra", contravariant=True)
R = TypeVar("R")

LOADER = "loader"
"""What the threads are called that load."""
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
    again: Callable[[], Loaded] | None = None
    """Look at the repository again; the engine then runs what is new beside what is old. Raises whatever goes wrong."""
    settle: Callable[[], None] = lambda: None
    """Let the engine forget all bundles but those of this catalog."""

    @property
    def devices(self) -> dict[str, list[str]]:
        """Where each bundle is."""
        return {name: [self.device] for name in self.catalog.digests}


class Host(Protocol[B_contra]):
    """What runs bundles: `service.engine.Engine`."""

    def hold(self, bundles: Mapping[str, B_contra], before: Mapping[str, B_contra], /) -> None:
        """From now on run `bundles`, and those `before` them that a key's digest tells apart."""

    def run(self, key: Key, images: Sequence[Pixels], seeds: Sequence[int], /) -> Ran:
        """An outcome per image."""

    def memory_bytes(self) -> float:
        """Allocated on the device."""

    def give_back(self) -> None:
        """Hand freed memory of the device back to it."""


def load_engine(settings: Settings) -> Loaded:
    """Load the model repository and warm it up, in this process with torch. Takes seconds."""
    from models import Bundle, check_bundle, load_bundle
    from service.engine import Engine, choose_device
    from service.tokens import strong_tokens

    device = choose_device(settings.device)
    # An accelerator is tuned for full batches too; on a CPU a full batch of a slow defense takes seconds.
    largest = settings.max_batch_size if device.type == "cuda" else min(4, settings.max_batch_size)
    sizes = sorted({1, largest})

    def load(path: Path) -> Bundle:
        bundle = load_bundle(path, device=device)
        bundle.record()
        return bundle

    def warm(name: str, bundle: Bundle) -> None:
        Engine({name: bundle}, device).warm(sizes)

    directory, pixels = settings.model_repository, settings.max_image_pixels
    renew = partial(renew_repository, directory, load, check_bundle, warm, pixels)
    host: Host[Bundle] = Engine({}, device, strong_tokens(settings))
    return load_into(host, renew, engine="torch", device=str(device))


def load_into(
    host: Host[B],
    renew: Callable[[Mapping[str, B]], tuple[dict[str, B], list[Refusal]]],
    before: Mapping[str, B] | None = None,
    *,
    engine: str,
    device: str,
) -> Loaded:
    """What `renew` makes of the bundles `before`, in `host`, which runs those too until it `settle`s."""
    older = {} if before is None else before
    bundles, refused = renew(older)
    host.hold(bundles, older)

    def settle() -> None:
        host.hold(bundles, {})
        _collect()
        host.give_back()

    again = partial(load_into, host, renew, bundles, engine=engine, device=device)
    return Loaded(Catalog(bundles, refused), host.run, engine, device, host.memory_bytes, again, settle)


def _collect() -> None:
    """Free networks that nobody uses: they hold each other in circles, and the collector may have been told to pass."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()


async def in_loader(load: Callable[[], R]) -> R:
    """What `load` gives, in a thread that ends.

    OpenMP counts the threads that each caller of torch has left waiting, and once there are more than processors it
    puts workers to sleep between operations, which nearly doubles a request's time.
    """
    loader = ThreadPoolExecutor(1, LOADER)
    try:
        return await asyncio.get_running_loop().run_in_executor(loader, load)
    finally:
        loader.shutdown(wait=False)


def leave_if_loading(status: int) -> None:
    """End the process with `status` if a thread still loads: the interpreter would wait for it."""
    if any(thread.name.startswith(LOADER) for thread in threading.enumerate()):
        leave_now(status)


def leave_now(status: int) -> NoReturn:
    """End the process although a thread works: the interpreter would wait for it, or crash under it."""
    logger.warning("what still loads or runs is given up")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


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
