"""Where images come from and results go: a path, or the URI of an object store, as pyarrow opens them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs


class BulkError(ValueError):
    """What stops a run before it begins; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Place:
    """A directory or file, `path` on `system`. It can be sent to other machines."""

    system: fs.FileSystem
    path: str

    def __truediv__(self, name: str) -> Place:
        return Place(self.system, f"{self.path}/{name}")

    def kind(self) -> fs.FileType:
        """File, Directory or NotFound."""
        return self.system.get_file_info(self.path).type

    def names(self) -> list[str]:
        """Every file below, relative to this place, in order; nothing below a place that is not there."""
        found = self.system.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return sorted(info.path[len(self.path) + 1 :] for info in found if info.type == fs.FileType.File)

    def read(self) -> bytes:
        """The file's content. Raises OSError."""
        with self.system.open_input_file(self.path) as file:
            content: bytes = file.read()
        return content

    def write(self, content: bytes | memoryview) -> None:
        """Write the file, and the directories above it. Whoever is interrupted may leave half of it."""
        self.system.create_dir(self.path.rpartition("/")[0], recursive=True)
        with self.system.open_output_stream(self.path) as file:
            file.write(content)

    def write_whole(self, content: bytes | memoryview) -> None:
        """As `write`, but the file appears as a whole or not at all; another of that name is replaced."""
        folder, _, name = self.path.rpartition("/")
        half = Place(self.system, f"{folder}/.{name}")
        half.write(content)
        self.system.move(half.path, self.path)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files below."""
        for name in names:
            self.system.delete_file(f"{self.path}/{name}")


def open_place(text: str) -> Place:
    """The place of a path (relative to the working directory), or of a URI such as `s3://bucket/photos`.

    Raises BulkError if pyarrow cannot reach it.
    """
    if "://" not in text:
        return Place(fs.LocalFileSystem(), str(Path(text).resolve()))
    try:
        system, path = fs.FileSystem.from_uri(text)
    except (OSError, pa.ArrowException) as error:
        raise BulkError(f"{text.partition('://')[0]}://... cannot be opened: {first_line(error)}") from None
    return Place(system, path.rstrip("/"))


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error) or type(error).__name__).partition("\n")[0]
