"""Counting what a process does to the disk, and interfering at a given count: two ways of doing the same.

``Native`` sees every system call that changes the disk, whoever makes it (``shim.c``). ``Patched`` needs no compiler
and sees what Python code does through ``os``, so it is fit for lowrank's own saves, which go through nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

COUNT, KILL, TEAR, FULL = 1, 2, 3, 4  # as in shim.c; TEAR and FULL count writes alone


class Calls(Protocol):
    def arm(self, what: int, number: int = 0) -> None:
        """From now on: count; die before the ``number``-th call; tear that write; have no space from it on."""

    def disarm(self) -> int:
        """Not any more; how many there were."""


class Native:
    def __init__(self, library: Path) -> None:
        self.shim = ctypes.CDLL(str(library))
        self.shim.shim_disarm.restype = ctypes.c_long

    def arm(self, what: int, number: int = 0) -> None:
        refused = self.shim.shim_arm(ctypes.c_int(what), ctypes.c_long(number))
        if refused:
            raise OSError(refused, f"seccomp: {os.strerror(refused)}")

    def disarm(self) -> int:
        return int(self.shim.shim_disarm())


class Patched:
    names = ("open", "write", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "ftruncate")

    def __init__(self) -> None:
        self.what = self.number = self.seen = 0
        self.lock = threading.Lock()
        self.real = {name: getattr(os, name) for name in self.names}
        for name, real in self.real.items():
            setattr(os, name, partial(self.called, name, real))

    def arm(self, what: int, number: int = 0) -> None:
        self.what, self.number, self.seen = what, number, 0

    def disarm(self) -> int:
        self.what = 0
        return self.seen

    def called(self, name: str, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if self.what and self.counts(name, arguments):
            with self.lock:
                self.seen += 1
                mine = self.seen
            if self.what == FULL and mine >= self.number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.what in (KILL, TEAR) and mine == self.number:
                if self.what == TEAR:
                    real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                self.real["write"](2, f"killed at call {mine} ({name})\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    def counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "open":
            return bool(arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and self.what in (COUNT, KILL)
        if name == "write":
            return stat.S_ISREG(os.fstat(arguments[0]).st_mode) and arguments[0] > 2
        return self.what in (COUNT, KILL)


def build(folder: Path) -> Path:
    """The shim, compiled. SystemExit where that cannot be done."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise SystemExit("the shim needs Linux on x86-64 and a C compiler; --calls patched does without, for lowrank")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library
