"""What a process takes beside tensors.

On CUDA only the allocator counts, and it rounds. On a CPU the process is measured as it is, and what it will grow by is
known from runs: the code of libraries as it is first used, products compiled by shape (fast/heap.py bounds them), and
holes. The C library's ``memalign`` needs a hole larger than a tensor to put it in, and products' own work space lies
between what is kept, so that the heap is larger than what is in it by about a quarter of what a step adds; by far less
where linear layers are bare, and nothing small is made between what is large.
"""

from __future__ import annotations

import torch

from lowrank.fast import heap, linear

LIBRARIES = 70e6  # bytes of code and modules that the first steps, evaluation and saving use, and of their leavings
BITSANDBYTES = 45e6  # of importing it, which quantising does
COMPILED = 0.63e6  # of a compiled product
HOLES = 0.25  # of what a step adds, where every linear layer is adapted or trains …
FEWER = 0.03  # … and where none is
AGAIN = 10.0  # times what is computed again of one block: recomputation makes much between little that stays
ROUNDED = 0.02  # of the same, by CUDA's allocator: blocks of 512 bytes, and of 2 MB where a tensor is larger


def status_mb(field: str) -> float:
    """A field of what Linux tells of this process (VmRSS, VmHWM) in MB of 10⁶ bytes; 0 where it does not."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith(f"{field}:")), 0.0)
    except OSError:
        return 0.0


def interpreter(device: torch.device) -> int:
    """Bytes of this process as it is now, on a CPU; on CUDA only the allocator counts."""
    return 0 if device.type == "cuda" else round(status_mb("VmRSS") * 1e6)


def slack(device: torch.device, quantised: bool, holes: float, added: int, again: int) -> int:
    """Bytes beside the tensors, where ``added`` of them come and go, ``holes`` times so many lie unused between them,
    and ``again`` are made anew in each block."""
    if device.type == "cuda":
        return round(ROUNDED * added)
    compiled = 0 if linear.cannot() else heap.PRODUCTS * COMPILED
    return round(LIBRARIES + compiled + quantised * BITSANDBYTES + holes * added + AGAIN * again)
