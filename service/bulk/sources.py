"""What there is to do: the images of a folder, or the rows of a parquet data set, each with a name of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from service.bulk.places import BulkError, Place, first_line

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PARQUET = ".parquet"
FOOTERS_AT_ONCE = 16
ROWS_AT_ONCE = 256
"""Of a parquet file, in memory while its rows are read."""


Rows = NDArray[np.int64]


class Unreadable(Exception):
    """A file that cannot be read now, or at all."""


@dataclass(frozen=True, slots=True)
class Source:
    """Image files below `place`, or, if `column` names one, the rows of parquet files below it."""

    place: Place
    column: str | None = None

    @property
    def keys(self) -> list[str]:
        """The columns that name an image: its file relative to the source, and its row in a parquet file."""
        return ["path"] if self.column is None else ["path", "row"]


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a source, by its keys, in order, and how many files are of no kind that it looks for."""

    source: Source
    images: pa.Table
    left_out: int


def list_source(place: Place, column: str | None = None) -> Listing:
    """Look through a folder, or at a single file. Names that begin with `.` or `_` are passed over.

    Raises BulkError if there is nothing to do, or no saying what.
    """
    where = place.path
    if place.kind() == fs.FileType.NotFound:
        raise BulkError(f"SOURCE: there is no {where}")
    if place.kind() == fs.FileType.File:
        folder, _, name = place.path.rpartition("/")
        place, names = Place(place.system, folder), [name]
    else:
        names = [name for name in place.names() if not any(part[0] in "._" for part in name.split("/"))]
    images = [name for name in names if name.lower().endswith(IMAGES)]
    tables = [name for name in names if name.lower().endswith(PARQUET)]
    if images and tables and column is None:
        raise BulkError(f"SOURCE: {where} has image files and parquet files; --column COLUMN takes the latter")
    if tables and (column is not None or not images):
        return _list_rows(place, tables, column, len(names) - len(tables))
    if not images or column is not None:
        raise BulkError(f"SOURCE: no {'parquet files' if column else ', '.join((*IMAGES, PARQUET))} in {where}")
    return Listing(Source(place), pa.table({"path": pa.array(images, pa.string())}), len(names) - len(images))


def _list_rows(place: Place, names: Sequence[str], column: str | None, left_out: int) -> Listing:
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        footers = list(threads.map(lambda name: _footer(place / name), names))
    for name, (_, schema) in zip(names, footers, strict=True):
        column = _image_column(name, schema, column)
    listed = [
        pa.table({"path": pa.repeat(pa.scalar(name), rows), "row": pa.array(np.arange(rows))})
        for name, (rows, _) in zip(names, footers, strict=True)
    ]
    images = pa.concat_tables(listed)
    if not images.num_rows:
        raise BulkError(f"SOURCE: the parquet files in {place.path} have no rows")
    return Listing(Source(place, column), images, left_out)


def _footer(place: Place) -> tuple[int, pa.Schema]:
    try:
        with place.system.open_input_file(place.path) as file:
            parquet = pq.ParquetFile(file)
            return parquet.metadata.num_rows, parquet.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise BulkError(f"SOURCE: {place.path} cannot be read: {first_line(error)}") from None


def _image_column(name: str, schema: pa.Schema, wanted: str | None) -> str:
    """The column `wanted`, or the only one that can hold images."""
    able = [field.name for field in schema if _holds_images(field.type)]
    if wanted is None and len(able) == 1:
        return str(able[0])
    if wanted is None or wanted not in able:
        what = "--column is needed" if wanted is None else f"--column: {wanted} holds no images"
        raise BulkError(f"{what}; columns of {name} that can hold images: {', '.join(able) or 'none'}")
    return wanted


def _holds_images(kind: pa.DataType) -> bool:
    """Whether it is bytes, or a struct with a field `bytes`, as data sets of Hugging Face have."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def read_images(source: Source, images: pa.Table, max_bytes: int) -> Iterator[bytes | int | Unreadable]:
    """For each of `images` its bytes; their number if they are more than `max_bytes`; or why there are none."""
    paths = images["path"].to_numpy()
    if source.column is None:
        yield from (_read_file(source.place / path, max_bytes) for path in paths)
        return
    rows = images["row"].to_numpy()
    starts = [0, *(np.flatnonzero(paths[1:] != paths[:-1]) + 1), len(paths)]
    for start, end in pairwise(starts):
        yield from _read_rows(source.place / paths[start], source.column, rows[start:end], max_bytes)


def _read_file(place: Place, max_bytes: int) -> bytes | int | Unreadable:
    try:
        with place.system.open_input_file(place.path) as file:
            size: int = file.size()
            if size > max_bytes:
                return size
            content: bytes = file.read()
            return content
    except OSError:
        return Unreadable()


def _read_rows(place: Place, column: str, rows: Rows, max_bytes: int) -> Iterator[bytes | int | Unreadable]:
    """As `read_images`, of one parquet file; `rows` ascend."""
    read = 0
    try:
        with place.system.open_input_file(place.path) as file:
            for value in _values(pq.ParquetFile(file), column, rows):
                read += 1
                content = value.get("bytes") if isinstance(value, dict) else value
                yield b"" if content is None else content if len(content) <= max_bytes else len(content)
    except (OSError, pa.ArrowException):
        for _ in rows[read:]:
            yield Unreadable()


def _values(file: pq.ParquetFile, column: str, rows: Rows) -> Iterator[Any]:
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if ((start <= rows) & (rows < end)).any():
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                wanted = rows[(start <= rows) & (rows < start + batch.num_rows)]
                yield from batch.column(0).take(pa.array(wanted - start)).to_pylist()
                start += batch.num_rows
        start = end
