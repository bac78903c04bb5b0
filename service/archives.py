"""Several files in one answer: a zip that is made in memory, file by file."""

from __future__ import annotations

import io
from zipfile import ZIP_STORED, ZipFile, ZipInfo

READABLE = 0o644 << 16
"""Permissions, where a zip has them: without any, unpacked files could not be read."""


class Archive:
    """A zip that grows. Files are stored, not deflated: PNGs are compressed already. Not thread-safe."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
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

    def finish(self) -> bytes:
        """The whole zip; nothing can be added any more."""
        self._zip.close()
        return self._bytes.getvalue()
