"""From arguments to a plan: what is asked is checked before anything runs."""

from __future__ import annotations

import secrets
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from models import Bundle, BundleError, load_bundle
from service.bulk.places import BulkError, Place, open_place
from service.bulk.sources import list_source
from service.bulk.stages import Plan
from service.bulk.targets import Run, find_done, missing, open_run
from service.errors import InvalidParameter
from service.parameters import ClassifyParameters, PurifyParameters, validated
from service.questions import FRESH_SEED_BITS, key_for
from service.repository import Catalog
from service.settings import Settings
from service.work import Key, Operation

DEFAULT_TOP = 5
MAX_PART_IMAGES = 1024
MAX_PART_BYTES = 64 * 2**20
"""Of a part's pixels."""
USUAL_PARTS = 64
"""As many parts at least, if they still fill a batch: work for every engine, and progress to see."""


@dataclass(frozen=True, slots=True)
class Work:
    """A plan, and what of it is left to do."""

    plan: Plan
    left: pa.Table
    """The images, by the source's keys."""
    left_out: int
    """Files of the source that are no images."""
    done: int
    """Images that earlier runs have done."""
    failed: int
    """Of these."""
    begun: bool
    """Whether an earlier run began it."""


def make_plan(arguments: Namespace, settings: Settings) -> Work:
    """What `arguments` ask for, and what is left of it. Writes to the target that it was begun.

    Raises BulkError if they cannot be followed.
    """
    source, target = open_place(arguments.source), open_place(arguments.target)
    _check_apart(source, target)
    directory, bundle = _load(Path(arguments.repository or settings.model_repository), arguments, settings)
    key = _key(arguments, directory, bundle)
    listing = list_source(source, arguments.column)
    draws = bundle.manifest.is_random(key.defense)
    batch_size = arguments.batch_size or settings.max_batch_size
    wanted = Run(
        operation=key.operation,
        source=source.path,
        column=listing.source.column,
        model=key.model,
        digest=bundle.digest,
        defense=key.defense,
        votes=key.votes,
        top_k=min(arguments.top_k or DEFAULT_TOP, len(bundle.classes)),
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=settings.max_image_pixels,
        seed=secrets.randbits(FRESH_SEED_BITS) if arguments.seed is None else arguments.seed,
        part_size=_part_size(listing.images.num_rows, batch_size, bundle.input_size),
    )
    run, begun = open_run(target, wanted, seed_given=arguments.seed is not None)
    keys = listing.source.keys
    done = find_done(target, keys)
    plan = Plan(
        run=run,
        source=listing.source,
        target=target,
        bundle=str(directory),
        classes=bundle.classes,
        input_size=bundle.input_size,
        draws=draws,
        batch_size=max(1, batch_size // key.votes),
    )
    failed = len(done) - done["error"].null_count
    return Work(plan, missing(listing.images, done, keys), listing.left_out, len(done), failed, begun)


def _check_apart(source: Place, target: Place) -> None:
    """What is written must not be read as an image."""
    one, other = f"{source.path}/", f"{target.path}/"
    if source.system.type_name == target.system.type_name and (one.startswith(other) or other.startswith(one)):
        raise BulkError("TARGET: it must be neither in SOURCE, nor SOURCE in it")


def _load(repository: Path, arguments: Namespace, settings: Settings) -> tuple[Path, Bundle]:
    """The directory and the bundle of `--model`: the newest version, if it names none."""
    wanted = arguments.model or settings.default_model
    name, _, version = wanted.partition("@")
    known = sorted(path.parent for path in repository.glob("*/*/bundle.json") if path.parent.name.isdecimal())
    able = [path for path in known if path.parent.name == name and version in ("", path.name)]
    if not able:
        names = ", ".join(f"{path.parent.name}@{path.name}" for path in known)
        raise BulkError(f"--model: there is no {wanted} in {repository}; there are: {names or 'none'}")
    directory = max(able, key=lambda path: int(path.name)).resolve()
    try:
        return directory, load_bundle(directory)
    except BundleError as error:
        raise BulkError(f"--model: {wanted} is refused: {error}") from None


def _key(arguments: Namespace, directory: Path, bundle: Bundle) -> Key:
    """By the rules of the service's query parameters."""
    name = f"{directory.parent.name}@{directory.name}"
    catalog = Catalog({name: bundle})
    given = {field: getattr(arguments, field) for field in ("defense", "seed", "votes", "top_k")}
    given = {field: value for field, value in given.items() if value is not None}
    operation = Operation(arguments.operation)
    kind = ClassifyParameters if operation is Operation.CLASSIFY else PurifyParameters
    try:
        return key_for(operation, name, catalog, validated(kind, given, "arguments"))
    except InvalidParameter as error:
        raise BulkError(f"--{error.detail.replace('top_k', 'top-k')}") from None


def _part_size(images: int, batch_size: int, input_size: tuple[int, int]) -> int:
    """Whole batches, so that an image's batch does not depend on what earlier runs have done."""
    height, width = input_size
    most = max(1, min(MAX_PART_IMAGES, MAX_PART_BYTES // (3 * height * width)))
    return max(1, min(-(-images // USUAL_PARTS), most) // batch_size) * batch_size
