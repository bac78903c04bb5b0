"""Several files in one answer: a zip that is made in memory, file by file."""

from __future__ import annotations

import io
from zipfile import ZIP_STORED, ZipFile, ZipInfo

READABLE = 0o644 << 16
"""Permissions, where a zip has them: without any, unpacked files could not be read."""


class Archive:
    """A zip that grows. Files are stored, not deflated: PNGs are compressed already. Not thread-safe."""

    def __init__(self) -> None:
        self._bytes = _Tail()
        self._zip = ZipFile(self._bytes, "w", ZIP_STORED)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._bytes.tell()

    def add(self, name: str, data: bytes) -> None:
        """Append a file. It has no date, so that the same files make the same zip."""
        entry = ZipInfo(name)
        entry.external_attr = READABLE
        self._zip.writestr(entry, data)

    def take(self) -> bytes:
        """What was added since the last time; it is not kept, and `finish` gives the rest."""
        return self._bytes.take()

    def finish(self) -> bytes:
        """The whole zip, or what of it was not taken; nothing can be added any more."""
        self._zip.close()
        return self._bytes.getvalue()


class _Tail(io.BytesIO):
    """The end of a file, whose beginning was taken. Positions count from the beginning.

    A zip goes back to the head of the file that it adds, and never further.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0

    def tell(self) -> int:
        return self._taken + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._taken + super().seek(offset - self._taken if whence == io.SEEK_SET else offset, whence)

    def take(self) -> bytes:
        data = self.getvalue()
        self._taken += len(data)
        super().seek(0)
        self.truncate(0)
        return data
