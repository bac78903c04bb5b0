"""What is done: the results below a target, whose arguments stay those of its first run.

TARGET/run.json                 the arguments that shape an answer, with the bundle's digest and the seed
TARGET/results/part-*.parquet   a row for each image; a part appears when it is whole
TARGET/images/...png            the purified images of a folder, each written before its row
"""

from __future__ import annotations

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from service.bulk.places import BulkError, Place
from service.work import Operation

RUN = "run.json"
RESULTS = "results"
IMAGES = "images"


class Run(BaseModel):
    """What all runs into one target have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    operation: Operation
    source: str
    column: str | None
    model: str
    digest: str
    defense: str
    votes: int
    top_k: int
    max_image_bytes: int
    max_image_pixels: int
    seed: int
    """What every image's own seed is derived from."""
    part_size: int
    """Rows of a file of results: as many are lost, and done again, where a run is killed."""


def open_run(target: Place, run: Run, *, seed_given: bool) -> tuple[Run, bool]:
    """The run to go on with, and whether there was one before; `run`, written down, where there was none.

    Raises BulkError if the earlier one has other arguments, or the target holds something else.
    """
    if target.kind() == fs.FileType.File:
        raise BulkError(f"TARGET: {target.path} is a file")
    if (target / RUN).kind() == fs.FileType.NotFound:
        if target.names():
            raise BulkError(f"TARGET: {target.path} is not empty, and no run of this command began it")
        (target / RUN).write_whole(run.model_dump_json(indent=1).encode())
        return run, False
    try:
        earlier = Run.model_validate_json((target / RUN).read())
    except ValidationError:
        raise BulkError(f"TARGET: {target.path}/{RUN} is not one of this version") from None
    free = {"part_size"} if seed_given else {"part_size", "seed"}
    before, now = earlier.model_dump(mode="json", exclude=free), run.model_dump(mode="json", exclude=free)
    differing = [f"{name} was {value}, now {now[name]}" for name, value in before.items() if now[name] != value]
    if differing:
        raise BulkError(f"TARGET: {target.path} was begun with other arguments: {'; '.join(differing)}")
    return earlier, True


def find_done(target: Place, keys: list[str]) -> pa.Table:
    """`keys` and `error` of every image that has a row. What a killed run left unfinished is deleted.

    Raises BulkError for a damaged part.
    """
    results = target / RESULTS
    names = results.names()
    results.remove(name for name in names if name.startswith("."))
    empty = pa.schema([("path", pa.string()), ("row", pa.int64()), ("error", pa.string())])
    parts = [pa.schema([empty.field(name) for name in [*keys, "error"]]).empty_table()]
    for name in names:
        if name.startswith("."):
            continue
        try:
            parts.append(pq.read_table(io.BytesIO((results / name).read()), columns=[*keys, "error"]))
        except pa.ArrowException:
            raise BulkError(f"TARGET: {results.path}/{name} is damaged; once deleted, it is done again") from None
    return pa.concat_tables(parts)


def missing(images: pa.Table, done: pa.Table, keys: list[str]) -> pa.Table:
    """The rows of `images` that `done` has not, in order."""
    return images.join(done.select(keys), keys, join_type="left anti").sort_by([(key, "ascending") for key in keys])


def write_part(target: Place, keys: list[str], rows: pa.Table) -> None:
    """Write results. Its name follows from its keys: the same images done twice replace themselves."""
    named = hashlib.sha256(json.dumps([rows[key].to_pylist() for key in keys]).encode())
    file = io.BytesIO()
    pq.write_table(rows, file)
    (target / RESULTS / f"part-{named.hexdigest()[:16]}.parquet").write_whole(file.getbuffer())


def png_name(path: str) -> str:
    """What the purified image of the file `path` is called: its name, with `.png` behind it if it is another format."""
    return path if path.lower().endswith(".png") else f"{path}.png"
