"""The three things that are done with every part, each in a process that Ray starts: decode, run, write.

A part is a block of Ray Data: rows named by the source's keys, as arrays by column. One bad image fails alone: from the
stage that finds it bad on, its row has the code of its problem in `error`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service.answers import top
from service.bulk.places import Place
from service.bulk.sources import Source, Unreadable, read_images
from service.bulk.targets import IMAGES, Run, png_name, write_part
from service.errors import BodyTooLarge, ClarifierError, EmptyBody, InferenceFailed
from service.images import decode_image, encode_pixels, to_bytes
from service.questions import FRESH_SEED_BITS
from service.work import Answer, Classified, EngineFault, Key, Operation, Pixels, Purified, Ran

logger = logging.getLogger(__name__)

Columns = dict[str, NDArray[Any]]
Outcome = Answer | ClarifierError
RunBatch = Callable[[Key, Sequence[Pixels], Sequence[int]], Ran]

UNREADABLE = "unreadable"
"""The one problem that the service does not know: a file that could not be read."""
VERDICTS = pa.list_(pa.struct([("label", pa.string()), ("index", pa.int64()), ("probability", pa.float64())]))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the stages need to know."""

    run: Run
    source: Source
    target: Place
    bundle: str
    """Its directory."""
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    draws: bool
    """Whether the defense is random."""
    batch_size: int

    @property
    def key(self) -> Key:
        """What is asked of the engine."""
        return Key(self.run.operation, self.run.model, self.run.defense, self.run.votes)


def image_seed(seed: int, path: str, row: int | None = None) -> int:
    """The seed of one image of a run: 53 bits of a sha-256 of the run's seed, the file, and the row if there is one."""
    text = f"{seed}\n{path}" if row is None else f"{seed}\n{path}\n{row}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - FRESH_SEED_BITS)


def decode(images: pa.Table, plan: Plan) -> Columns:
    """The keys, and for each image its seed, its `pixels` (n, H, W, 3) at the model's size, and its error or "".

    Runs in a task.
    """
    pixels = np.zeros((images.num_rows, *plan.input_size, 3), np.uint8)
    errors = [""] * images.num_rows
    for place, upload in enumerate(read_images(plan.source, images, plan.run.max_image_bytes)):
        try:
            pixels[place] = _pixels(upload, plan)
        except ClarifierError as error:
            errors[place] = error.code
        except Unreadable:
            errors[place] = UNREADABLE
    keys = {name: images[name].to_numpy() for name in plan.source.keys}
    named = zip(*(images[name].to_pylist() for name in keys), strict=True)
    seeds = np.array([image_seed(plan.run.seed, *name) for name in named], np.uint64)
    return {**keys, "seed": seeds, "pixels": pixels, "error": np.array(errors, object)}


def _pixels(upload: bytes | int | Unreadable, plan: Plan) -> Pixels:
    if isinstance(upload, Unreadable):
        raise upload
    if isinstance(upload, int):
        raise BodyTooLarge(limit=plan.run.max_image_bytes, actual=upload)
    if not upload:
        raise EmptyBody
    return decode_image(upload, plan.input_size, plan.run.max_image_pixels).pixels


class Runner:
    """An engine with the plan's bundle, in an actor: one for each device."""

    def __init__(self, plan: Plan, device: str, threads: int) -> None:
        import torch

        from models import load_bundle
        from service.engine import Engine, choose_device

        torch.set_num_threads(threads)
        self._plan = plan
        chosen = choose_device(device)
        self._engine = Engine({plan.run.model: load_bundle(plan.bundle, chosen)}, chosen)

    def __call__(self, part: Columns) -> Columns:
        """The part with `probabilities` (n, K), or with `pixels` purified and `linf`, of every image that was sound."""
        count, pixels = len(part["error"]), part.pop("pixels")
        if self._plan.run.operation is Operation.CLASSIFY:
            results: Columns = {"probabilities": np.zeros((count, len(self._plan.classes)), np.float32)}
        else:
            results = {"pixels": np.zeros_like(pixels), "linf": np.zeros(count, np.float32)}
        errors = part["error"].copy()
        sound = np.flatnonzero(errors == "")
        for start in range(0, len(sound), self._plan.batch_size):
            places = sound[start : start + self._plan.batch_size]
            seeds = part["seed"][places].tolist()
            outcomes = outcomes_of(self._engine.run, self._plan.key, list(pixels[places]), seeds)
            for place, outcome in zip(places, outcomes, strict=True):
                if isinstance(outcome, ClarifierError):
                    errors[place] = outcome.code
                else:
                    _put(results, place, outcome)
        return {**part, **results, "error": errors}


def outcomes_of(run: RunBatch, key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> list[Outcome]:
    """An outcome for each. A batch that fails is halved, until only the guilty image has failed.

    Raises EngineFault where a device fails with a single image: that is no fault of the image.
    """
    try:
        return list(run(key, images, seeds).outcomes)
    except Exception as error:
        if len(images) > 1:
            half = len(images) // 2
            first = outcomes_of(run, key, images[:half], seeds[:half])
            return [*first, *outcomes_of(run, key, images[half:], seeds[half:])]
        if isinstance(error, EngineFault):
            raise
        logger.exception("an image failed")
        return [InferenceFailed()]


def _put(results: Columns, place: int, answer: Answer) -> None:
    match answer:
        case Classified():
            results["probabilities"][place] = answer.probabilities
        case Purified():
            results["pixels"][place] = to_bytes(answer.image)
            results["linf"][place] = answer.linf


def write(part: Columns, plan: Plan) -> Columns:
    """Write the part's results; how many they are, and how many of them failed. Runs in a task."""
    answers = _verdicts(part, plan) if plan.run.operation is Operation.CLASSIFY else _purified(part, plan)
    failed = part["error"] != ""
    keys = {name: pa.array(part[name]) for name in plan.source.keys}
    seeds = pa.array(part["seed"], pa.uint64(), mask=None if plan.draws else np.ones(len(failed), bool))
    errors = pa.array(part["error"], pa.string(), mask=~failed)
    write_part(plan.target, plan.source.keys, pa.table({**keys, **answers, "seed": seeds, "error": errors}))
    return {"images": np.array([len(failed)]), "failed": np.array([failed.sum()])}


def _verdicts(part: Columns, plan: Plan) -> dict[str, pa.Array]:
    tops = [
        None if error else top(probabilities, plan.classes, plan.run.top_k)
        for probabilities, error in zip(part["probabilities"], part["error"], strict=True)
    ]
    firsts = [None if verdicts is None else verdicts[0] for verdicts in tops]
    columns = {
        field.name: pa.array([None if first is None else dict(first)[field.name] for first in firsts], field.type)
        for field in VERDICTS.value_type
    }
    return {**columns, "top": pa.array(tops, VERDICTS)}


def _purified(part: Columns, plan: Plan) -> dict[str, pa.Array]:
    """Rows of a data set keep their column's name, and its shape as Hugging Face has it; files become files."""
    pngs = [
        None if error else encode_pixels(pixels, "image/png")
        for pixels, error in zip(part["pixels"], part["error"], strict=True)
    ]
    linf = pa.array(part["linf"], pa.float32(), mask=part["error"] != "")
    if plan.source.column is not None:
        images = [None if png is None else {"bytes": png, "path": None} for png in pngs]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return {plan.source.column: pa.array(images, kind), "linf": linf}
    files = [f"{IMAGES}/{png_name(path)}" if png else None for png, path in zip(pngs, part["path"], strict=True)]
    for file, png in zip(files, pngs, strict=True):
        if file and png:
            (plan.target / file).write(png)
    return {"file": pa.array(files, pa.string()), "linf": linf}
