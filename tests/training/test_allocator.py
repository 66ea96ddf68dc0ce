"""Freed memory is kept while the block computes on a CPU: counted by glibc itself."""

import ctypes
import subprocess
import sys

import pytest

COUNTED = """
import ctypes
import torch
from pathlib import Path
from fbnas.training.allocator import memory_kept

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2

def mapped(megabytes):
    before = libc.mallinfo2().hblks
    block = torch.ones(megabytes * 250_000)
    return libc.mallinfo2().hblks - before

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6

found = [mapped(64)]
with memory_kept(torch.device("cpu")):
    found.append(mapped(64))
    with memory_kept(torch.device("cpu")):
        found.append(mapped(64))
    found.append(mapped(64))  # the outer block goes on
    kept = resident()
found += [int(resident() < kept - 50), mapped(400)]
with memory_kept(torch.device("meta")):
    found.append(mapped(400))
print(found)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="no glibc that counts",
)
def test_memory_is_kept_inside_and_given_back_after() -> None:
    found = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=False
    )
    assert found.stdout == "[1, 0, 0, 0, 1, 1, 1]\n", found.stderr
