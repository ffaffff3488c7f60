"""One process owns a run directory, and any other is told which.

The kernel's ``flock`` on ``.lock`` ends with its process, however that ends. Where the file system has none, a file
that is created exclusively stands for it; one that was left behind goes when this host shows that its process has.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank.errors import RefusedError

LOCK, OWNER, RECOVERING = ".lock", ".lock-owner", ".lock-recovering"
WITHOUT_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
PATIENCE = 0.5  # seconds: an owner that is just beginning has written its name by then
held: set[int] = set()  # descriptors of this process's locks


def drop_in_child() -> None:
    """A forked child has its parent's descriptors, and would keep the lock of a parent that has died."""
    for descriptor in held:
        os.close(descriptor)
    held.clear()


os.register_at_fork(after_in_child=drop_in_child)


@dataclass(frozen=True)
class Process:
    """A process beyond its number, which another one will have some day."""

    process: int
    host: str
    machine: str  # tells hosts of one name apart; "" where unknown
    started: str  # boot/namespace of numbers/clock ticks since the boot; "" where unknown

    @classmethod
    def this(cls) -> Process:
        machine = content("/etc/machine-id") or content("/var/lib/dbus/machine-id")
        return cls(os.getpid(), socket.gethostname(), machine, start(os.getpid()))

    @classmethod
    def of(cls, text: str) -> Process | None:
        """The process that ``text`` names; None where that is torn, or another program's."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @property
    def here(self) -> bool:
        now = Process.this()
        return (self.host, self.machine) == (now.host, now.machine)

    @property
    def gone(self) -> bool:
        """Whether it has certainly ended: it was on this host, and this host has it no more."""
        mine = start(os.getpid())
        if not (self.here and mine and self.started.count("/") == 2):
            return False
        (boot, space, _), (my_boot, my_space, _) = self.started.split("/"), mine.split("/")
        if boot != my_boot:
            return bool(self.machine)  # booted since; without its number it may be another host of that name
        return space == my_space and start(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process}" + ("" if self.here else f" on {self.host}")


def start(process: int) -> str:
    """What ``started`` is of a process that runs now; empty where there is none of that number, or no /proc."""
    stat = content(f"/proc/{process}/stat").rpartition(")")[2].split()
    if len(stat) < 20:
        return ""
    return f"{content('/proc/sys/kernel/random/boot_id')}/{os.stat('/proc/self/ns/pid').st_ino}/{stat[19]}"


def content(path: str | Path) -> str:
    """Of a small file; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes a directory, new or not, this process's own; one that is then left with nothing in it is removed.

    Raises RefusedError, naming the owner, where another process has it, or this one has it already.
    """
    descriptor, owner = taken(folder), os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # a forked child that leaves by here must not undo its parent's
            let_go(folder, descriptor)


def taken(folder: Path) -> int | None:
    """The descriptor of the lock file, locked; None where the owner's file stands for it."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = locked(folder, until)
            if descriptor is not None:
                return descriptor
        except FileNotFoundError:
            continue  # an owner that left nothing has just removed the directory
        except FileExistsError:
            if os.path.lexists(folder) and not folder.is_dir():
                raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RefusedError(f"{folder / LOCK}: a link, which is not followed. Delete it.") from error
            if error.errno not in WITHOUT_FLOCK:
                raise
            if took_by_file(folder, until):
                return None


def locked(folder: Path, until: float) -> int | None:
    """A descriptor that holds the lock. None where the next try may have it: the file was removed meanwhile, so that
    whoever comes has a new one, or its owner is just beginning or ending."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    held.add(descriptor)
    mine = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, there = os.fstat(descriptor), os.stat(folder / LOCK)
        if (opened.st_dev, opened.st_ino) == (there.st_dev, there.st_ino):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, Process.this().text.encode(), 0)
            mine = True
    except BlockingIOError:
        refuse_owned(folder, LOCK, until)
    finally:
        if not mine:
            shut(descriptor)
    return descriptor if mine else None


def shut(descriptor: int) -> None:
    held.discard(descriptor)
    os.close(descriptor)


def living(folder: Path) -> str:
    """The living process that owns a directory, as it is told of; empty where none does. Takes nothing."""
    for name in (LOCK, OWNER):
        owner = Process.of(content(folder / name))
        if owner is not None and not owner.gone and (name == OWNER or not free(folder)):
            return str(owner)
    return ""


def free(folder: Path) -> bool:
    """Whether nobody holds the kernel's lock just now."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without: its owner is in a file of its own
        return True
    finally:
        os.close(descriptor)
    return True


def refuse_owned(folder: Path, name: str, until: float, advice: str = "") -> None:
    """Raises RefusedError where the file names a process that may live, or names none for too long."""
    owner = Process.of(content(folder / name))
    if (owner is not None and not owner.gone) or time.monotonic() > until:
        raise RefusedError(f"{folder}: in use by {owner or 'an unknown process'}.{advice}")
    time.sleep(0.01)


def took_by_file(folder: Path, until: float) -> bool:
    """Creates the owner's file. False where the next try may: the file of a process that is gone has been removed.

    Raises RefusedError where a process that may live has it.
    """
    if created(folder / OWNER):
        return True
    text = content(folder / OWNER)
    owner = Process.of(text)
    if owner is None or not owner.gone:
        advice = f" This file system has no locks: where it has ended, delete {folder / OWNER}."
        refuse_owned(folder, OWNER, until, advice)
    elif created(folder / RECOVERING):  # one at a time, or the second would remove the first one's new file
        try:
            if content(folder / OWNER) == text:
                (folder / OWNER).unlink(missing_ok=True)
        finally:
            (folder / RECOVERING).unlink(missing_ok=True)
    elif time.monotonic() < until:  # another process does, which takes no time: whose the directory is then will show
        time.sleep(0.01)
    else:
        refuse_owned(folder, RECOVERING, until, f" Where it has ended, delete {folder / RECOVERING}.")
    return False


def created(path: Path) -> bool:
    """Creates a file that names this process; False where there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, Process.this().text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def let_go(folder: Path, descriptor: int | None) -> None:
    """Gives the directory up; where nothing was left in it, it goes too."""
    empty = folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, OWNER}
    if empty:
        (folder / LOCK).unlink(missing_ok=True)
    if descriptor is None:
        (folder / OWNER).unlink(missing_ok=True)
    else:
        os.ftruncate(descriptor, 0)  # nobody reads a name that is no longer true
        shut(descriptor)
    if empty:
        with suppress(OSError):  # somebody else's by now
            folder.rmdir()
