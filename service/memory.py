"""How much memory is left to this process: requests are refused before the kernel kills it.

What counts is the limit of its control group, which containers have, or of one above it; where there is none, nobody
looks. Page cache that the kernel can drop is as good as free.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.25
"""Between two looks."""
RESERVE_SHARE = 1 / 16
"""Of a limit, what is kept for requests that are inside already."""
NO_LIMIT = 2**60
"""The first version of control groups says it with a number; this or more is one."""


@dataclass(frozen=True)
class Layout:
    """What a version of control groups calls things. Every file holds bytes, `stat` a line of them."""

    limit: str
    used: str
    droppable: str
    """The line of `memory.stat`."""


FIRST = Layout("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = Layout("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class Group:
    """A control group that limits memory."""

    folder: Path
    layout: Layout

    def limit(self) -> int:
        """Bytes, and others when somebody changes it. Raises OSError and ValueError where there is none."""
        return int((self.folder / self.layout.limit).read_text())  # which may be "max"

    def left(self) -> int:
        """Bytes. Raises OSError and ValueError where the kernel does not tell."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        used = int((self.folder / self.layout.used).read_text())
        return self.limit() - used + int(stat.get(self.layout.droppable, 0))


class Memory:
    """What was left at the last look."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """`groups` are at least one."""
        self._groups = groups
        self.left = 0
        """Bytes, by the group that leaves the least."""
        self.spare = 0
        """Bytes that new requests may take; 0 when they should be refused."""
        self.look()

    def look(self) -> None:
        """Look again; if little is left, hand back what the C library keeps of freed memory first."""
        self._read()
        if not self.spare:
            _trim()
            self._read()

    def _read(self) -> None:
        with suppress(OSError, ValueError):  # then what was true last holds
            left = [group.left() for group in self._groups]
            reserves = [int(group.limit() * RESERVE_SHARE) for group in self._groups]
            self.left = min(left)
            self.spare = max(0, min(bytes_ - reserve for bytes_, reserve in zip(left, reserves, strict=True)))


def find_memory(root: Path = Path("/")) -> Memory | None:
    """That of this process; None if no control group limits it. Everything is read below `root`."""
    groups = [group for folder, layout in _folders(root) if (group := _group(folder, layout)) is not None]
    return Memory(groups) if groups else None


async def watch_memory(memory: Memory, looked: Callable[[Memory], None]) -> None:
    """Look again and again, and tell `looked` each time."""
    while True:
        memory.look()
        looked(memory)
        await asyncio.sleep(INTERVAL_S)


def _folders(root: Path) -> list[tuple[Path, Layout]]:
    """Of the groups that this process is in, from its own to the topmost that can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = list[tuple[Path, Layout]]()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        mount, layout = root / "sys/fs/cgroup", SECOND
        if "memory" in names:
            mount, layout = mount / "memory", FIRST
        elif names != [""]:
            continue
        own = mount / path.lstrip("/")
        folders += [(folder, layout) for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    return folders


def _group(folder: Path, layout: Layout) -> Group | None:
    group = Group(folder, layout)
    try:
        group.left()
        return group if group.limit() < NO_LIMIT else None
    except (OSError, ValueError):
        return None


def _trim() -> None:
    """Hand freed memory back to the kernel, where the C library is glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
