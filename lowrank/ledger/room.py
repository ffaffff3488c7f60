"""How much memory a process can have, and sizes as a user writes them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from lowrank.errors import ConfigError

UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
CONTROL_GROUPS = (  # the second version's, then the first's: controller, limit, use
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
GIB = 2**30


def budget(text: str) -> int:
    """``24GiB``, ``24GB`` or ``800MB`` in bytes. Raises ConfigError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size <= 0:
        raise ConfigError(f"--budget: '{text}' is not allowed; a size with its unit, such as 24GiB, 24GB or 800MB.")
    return size


def gib(size: float) -> str:
    """``19.8 GiB``; what is smaller than one in MiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def room(device: torch.device) -> int:
    """Bytes that this process can hold on ``device``, what it holds already included: on CUDA of the allocator's, on a
    CPU of resident memory, by what is free and by the limits that a container and ``ulimit -v`` set."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    own = status("VmRSS")
    limits = [own + free for free in (unused(), in_container(), in_limit()) if free is not None]
    return min(limits, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is none."""
    return fields(Path("/proc/self/status")).get(field, 0)


def unused() -> int | None:
    return fields(Path("/proc/meminfo")).get("MemAvailable")


def in_container() -> int | None:
    """What a control group leaves, in its second version or its first."""
    for top, name, used in CONTROL_GROUPS:
        try:
            lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
            own = next(line.split(":")[2] for line in lines if line.split(":")[1] == top)
            folders = [Path("/sys/fs/cgroup") / top / own.strip("/"), Path("/sys/fs/cgroup") / top]
            folder = next(one for one in folders if (one / name).is_file())
            limit = (folder / name).read_text(encoding="ascii").strip()
            if limit.isdigit():
                return max(0, int(limit) - int((folder / used).read_text(encoding="ascii")))
        except (OSError, StopIteration, ValueError, IndexError):
            continue
    return None


def in_limit() -> int | None:
    """What RLIMIT_AS leaves of addresses; most of a large allocation becomes resident."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - status("VmSize"))


def fields(path: Path) -> dict[str, int]:
    """``Name:  12 kB`` lines in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    split = (line.replace(":", " ").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in split if len(words) == 3 and words[2] == "kB"}
