"""Memory that a batch frees is kept for the next one, counted in page faults of a process of its own."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

CODE = """
import resource, sys, threading
from service.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def batches(count):
    for _ in range(count):
        _ = [b"x" * (12 << 20) for _ in range(4)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def engine():
    batches(3)
    before = faults()
    batches(10)
    print(faults() - before)

thread = threading.Thread(target=engine)
thread.start()
thread.join()
"""
PAGES = 10 * 4 * (12 << 20) // 4096


def faults(how: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", CODE, how], text=True))


def test_what_a_batch_has_freed_is_not_cleared_again_for_the_next() -> None:
    assert faults("keep") < PAGES / 100


def test_by_default_it_is() -> None:
    """Else the module is there for nothing."""
    assert faults("default") > PAGES / 4
