"""How much memory is left to this process: requests are refused before the kernel kills it.

What counts is the limit of its control group, which containers have, or of one above it. Page cache that the kernel
can drop is as good as free.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.errors import ShortOfMemory

logger = logging.getLogger(__name__)

INTERVAL_S = 0.25
"""Between two looks. What requests may take meanwhile is bounded by what was left at the last one."""
RESERVE_SHARE = 1 / 16
RESERVE_BYTES = 128 * 2**20
"""Of a limit such a share, but no more than that, is kept for the engine's next batch and for small images."""
TRIM_EVERY_S = 5.0
"""At most: what is handed back is fetched again by the next batch."""
NO_LIMIT = 2**60
"""The first version of control groups says it with a number; this or more is one."""


@dataclass(frozen=True)
class Layout:
    """What a version of control groups calls things. Files hold bytes, those of `memory.stat` a line each."""

    limits: tuple[str, ...]
    used: str
    inactive: str
    active: str
    mapped: str
    """The page cache, by whether it was read again, and what of it a process has in its address space."""


FIRST = Layout(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "total_active_file",
    "total_mapped_file",
)
SECOND = Layout(("memory.max", "memory.high"), "memory.current", "inactive_file", "active_file", "file_mapped")


@dataclass(frozen=True)
class Group:
    """A control group that accounts for memory, whether it limits it or not."""

    folder: Path
    layout: Layout

    def limit(self) -> float:
        """Bytes, infinite where there is none. Raises OSError and ValueError where the kernel does not tell."""
        told = [(self.folder / name).read_text().strip() for name in self.layout.limits]
        limit = min(math.inf if text == "max" else int(text) for text in told)
        return math.inf if limit >= NO_LIMIT else limit

    def used(self) -> int:
        """Bytes, without what the kernel can drop. Raises as `limit`."""
        layout = self.layout
        lines = (self.folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in map(str.split, lines)}
        droppable = stat[layout.inactive] + max(0, stat[layout.active] - stat[layout.mapped])
        return int((self.folder / layout.used).read_text()) - droppable


class Memory:
    """What was left at the last look, and what of it is promised. Without `groups`, there is no end of it."""

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self.groups = groups
        self.spare = math.inf
        """Bytes that requests may still take; 0 when only small things are left."""
        self._reserve = 0.0
        self._trimmed_at = -math.inf
        self._promised = 0
        self._lock = threading.Lock()
        self._read()

    @property
    def promised(self) -> int:
        """Bytes, by `promise`."""
        return self._promised

    @contextmanager
    def promise(self, count: int) -> Iterator[None]:
        """For as long as the block runs, `count` bytes are for it. Any thread may ask.

        Raises ShortOfMemory if they are not there, unless they are few and nobody else was promised any.
        """
        with self._lock:
            if self._promised + count > max(self.spare, self._reserve / 2):
                raise ShortOfMemory
            self._promised += count
        try:
            yield
        finally:
            with self._lock:
                self._promised -= count

    def look(self) -> None:
        """Look again; where little is left, hand back what the C library keeps of freed memory first."""
        was_short = not self.spare
        self._read()
        now = time.monotonic()
        if self.spare < self._reserve and now - self._trimmed_at >= TRIM_EVERY_S:
            self._trimmed_at = now
            _trim()
            self._read()
        if was_short != (not self.spare):
            logger.warning("memory is short" if self.spare == 0 else "there is memory again")

    def _read(self) -> None:
        seen = [room for group in self.groups if (room := _room(group)) is not None]
        self.spare, self._reserve = min(seen, default=(math.inf, 0.0))


UNLIMITED = Memory()


def _room(group: Group) -> tuple[float, float] | None:
    """What `group` leaves to requests, and its reserve; None if the kernel does not tell."""
    try:
        limit = group.limit()
        reserve = min(limit * RESERVE_SHARE, RESERVE_BYTES)
        return max(0.0, limit - group.used() - reserve), reserve
    except (KeyError, OSError, ValueError):
        return None


def find_memory(root: Path = Path("/")) -> Memory:
    """That of this process. Everything is read below `root`."""
    groups = [Group(folder, layout) for folder, layout in _folders(root)]
    return Memory([group for group in groups if _room(group) is not None])


async def watch_memory(memory: Memory, looked: Callable[[], None]) -> None:
    """Look again and again, and call `looked` each time."""
    while True:
        try:
            await asyncio.to_thread(memory.look)
            looked()
        except Exception:
            logger.exception("the watch over memory stumbled")
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


def _trim() -> None:
    """Hand freed memory back to the kernel, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
