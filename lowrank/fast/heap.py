"""What a process on a CPU keeps beside its tensors, bounded.

Products. oneDNN compiles one for every shape and keeps the last 1,024, and the layer between it and PyTorch as many
again: two thirds of a megabyte each. Packs differ in length, so that every step brings some twenty shapes that never
come again, and a run of a hundred steps grows by a gigabyte. A step meets each of its shapes once a layer: as many as
two steps have are enough, and a shape that does come back costs a quarter of a millisecond.

Pages. glibc gives the top of its heap back when a step ends, and takes a large block from the system each time: all
are cleared and mapped again in the next step, a tenth of its time on SmolLM2. Kept, they are what the next step uses.

Neither changes a number. What the environment says goes first.
"""

from __future__ import annotations

import ctypes
import os
import sys

PRODUCTS = 64  # shapes
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # read when the first product is compiled
OURS_TO_SET = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGE = 1 << 30  # bytes from which on a block is the system's


def bound() -> None:
    """Before the first product of a process; calling it again does nothing more."""
    for name in CACHES:
        os.environ.setdefault(name, str(PRODUCTS))
    libc = glibc()
    if libc is not None and not any(name in os.environ for name in OURS_TO_SET):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Hands pages that hold nothing to the system: what comes next in this process may be another's turn."""
    libc = glibc()
    if libc is not None:
        libc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library, where its memory can be asked about and set."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "mallinfo2")) else None


class Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")] + [
        (name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def in_use() -> int | None:
    """Bytes that the process has asked its C library for and not given back; None where that does not tell."""
    libc = glibc()
    if libc is None:
        return None
    libc.mallinfo2.restype = Heap
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)
