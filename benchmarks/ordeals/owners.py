"""Several processes that want one run directory at one moment: one has it, the others are told whose it is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ordeals import forks
from benchmarks.ordeals.arm import Row
from benchmarks.ordeals.ground import Ground
from lowrank.errors import RefusedError
from lowrank.record import lock


def rows(ground: Ground, processes: int, rounds: int) -> Iterator[Row]:
    """In every other round the owner before was killed; of file systems one has locks and one has not."""
    title = f"{processes} processes for one run directory, {rounds} rounds: exactly one owner, named to the others"
    for with_locks in (True, False):
        points = [(number, number % 2 == 1, with_locks) for number in range(rounds)]
        where = "" if with_locks else ", on a file system without locks"
        yield Row(title + where, ground.judged(points, partial(round_, ground, processes)))


def round_(ground: Ground, processes: int, point: tuple[int, bool, bool]) -> str:
    number, stale, with_locks = point
    folder = ground.place(f"owned-{number}-{with_locks}")
    if not with_locks:
        fcntl.flock = no_locks  # what such a file system answers; children are forked with it
    if stale:
        leave_behind(folder)
    start, told, done = os.pipe(), os.pipe(), os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    children = [forks.fork(partial(contender, folder, start, told, done), null) for _ in range(processes)]
    for descriptor in (start[0], done[0], told[1]):
        os.close(descriptor)
    os.close(start[1])  # all at once
    lines = listened(told[0], processes)
    os.close(done[1])  # the owner may end
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    owners = [text.split()[1] for text in lines if text.startswith("owner")]
    others = [text for text in lines if not text.startswith("owner")]
    if len(owners) != 1 or len(lines) != processes or any(codes):
        return f"{len(owners)} owners; {lines}; exit codes {codes}"
    wrong = [text for text in others if not re.search(rf"in use by process {owners[0]}\b", text)]
    return f"the owner is {owners[0]}, but told was {wrong}" if wrong else ""


def no_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def contender(folder: Path, start: tuple[int, int], told: tuple[int, int], done: tuple[int, int]) -> None:
    os.close(start[1])
    os.close(done[1])
    os.read(start[0], 1)
    try:
        with lock.owned(folder):
            os.write(told[1], f"owner {os.getpid()}\n".encode())
            os.close(told[1])
            os.read(done[0], 1)
    except RefusedError as error:
        os.write(told[1], f"{' '.join(str(error).split())}\n".encode())


def listened(descriptor: int, lines: int) -> list[str]:
    """So many lines, or fewer where nobody is left to write."""
    found = b""
    while found.count(b"\n") < lines and (more := os.read(descriptor, 65536)):
        found += more
    os.close(descriptor)
    return found.decode().splitlines()


def leave_behind(folder: Path) -> None:
    """The directory as an owner leaves it that is killed."""

    def killed() -> None:
        with lock.owned(folder):
            (folder / "metrics.jsonl").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    forks.child(killed)
