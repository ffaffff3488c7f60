"""Ground floor of everything that is written: on the disk, and whole or not at all.

Every operation on a file goes through ``os``, one call at a time: each can fail, and be made to fail.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from lowrank.secrets import redacted

CHUNK = 4 << 20  # bytes of one write
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # what file systems say that cannot sync a folder


@dataclass(frozen=True)
class Written:
    """A file's content in two figures."""

    bytes: int
    sha256: str


def sync(path: Path) -> None:
    """A file or folder on the disk, not only in the page cache: a rename may reach it before the contents do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """The file of these pieces, on the disk when this returns; hashed as it is written, so that what the disk holds
    can be told from what was meant."""
    hashed, total = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        for piece in pieces:
            left = memoryview(piece).cast("B")
            while left:
                count = os.write(descriptor, left[:CHUNK])
                hashed.update(left[:count])
                total, left = total + count, left[count:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(total, hashed.hexdigest())


def write_text(path: Path, text: str) -> Path:
    """The whole file, without the secrets that it would hold, or, on any failure, none of it; returns ``path``."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(staged, [redacted(text).encode()])
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def reading(path: Path) -> BufferedReader:
    """A plain file, opened to be read: OSError for a link, a folder, a device or a pipe, which may lead anywhere or
    never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def starts_as(path: Path, expected: Written) -> bool:
    """Whether a file begins with what it held when it was ``expected``; it may have grown since."""
    try:
        with path.open("rb") as file:
            hashed, left = hashlib.sha256(), expected.bytes
            while left and (piece := file.read(min(left, CHUNK))):
                hashed.update(piece)
                left -= len(piece)
    except OSError:
        return False
    return left == 0 and hashed.hexdigest() == expected.sha256


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a plain file. Raises ValueError where it is larger than ``most`` bytes, before it is read."""
    with reading(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most:,} bytes")
    return content


def discard(path: Path) -> None:
    """Removes a folder, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def discard_empty(folder: Path) -> None:
    """Removes ``folder`` if nothing is in it, and its parents up to outputs/ while they are empty too."""
    top = Path(os.environ.get("LOWRANK_OUTPUTS", "outputs")).resolve()
    parents = [p for p in folder.resolve().parents if p.is_relative_to(top)]
    for path in (folder, *parents):
        if path.resolve() == Path.cwd():
            return
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
