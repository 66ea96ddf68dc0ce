"""The memory that a step on a CPU has used is kept for the next one.

glibc gives every block of more than 32 MB back to the system when it is freed, and the next layer's
feature map is mapped, faulted in page by page and zeroed anew. At 224x224 that is half the time of
a training step (`scripts/allocator`). Other allocators and systems are left alone.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 2**30  # bytes of a block; a larger one is mapped as ever
NEVER = 2**31 - 1  # bytes at the top of the heap that would be given back
HIGHEST = 2**25  # bytes that glibc's own threshold rises to

_within: list[torch.device] = []  # blocks under way, one in another


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory in the process while the block computes on a CPU, and give it back then."""
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    if not _within:
        libc.mallopt(MMAP_THRESHOLD, KEPT)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
    _within.append(device)
    try:
        yield
    finally:
        _within.pop()
        if not _within:
            libc.mallopt(MMAP_THRESHOLD, HIGHEST)
            libc.mallopt(TRIM_THRESHOLD, 2 * HIGHEST)
            libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc, whose thresholds can be set."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None)
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return found if all(hasattr(found, name) for name in needed) else None
