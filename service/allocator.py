"""How the C library keeps memory that a batch has freed.

Every batch takes and frees the same tens of megabytes. By default glibc hands them back to the kernel each time, which
then has to clear them again, page by page, for the next batch. `make bench` shows what that costs: offline with and
without it.
"""

from __future__ import annotations

import ctypes
import sys

# From glibc's <malloc.h>.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

KEEP_ALL = 2**31 - 1
"""The largest threshold that mallopt takes; a free top of the heap below it is kept."""
LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc allows no more. Larger blocks, such as a photograph being decoded, still go back at once."""


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to LARGEST_KEPT for the next batch. Call it before other threads start.

    One arena for all threads, since those of threads are cut into pieces of 64 MiB that go back whatever is set here.
    False, and nothing changed, where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    wanted = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: KEEP_ALL}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
