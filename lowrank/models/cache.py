"""The one folder outside the checkout in which prepared things are kept, and how something gets into it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank.disk import sync


def cache() -> Path:
    """``LOWRANK_CACHE``, else ``lowrank`` in the user's cache directory. The folder need not exist yet."""
    own = os.environ.get("LOWRANK_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "lowrank"


def prepared(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the cache, filled by ``make(folder)`` the first time it is asked for.

    A folder of that name is complete: it is filled under another name, synced and renamed. Processes that
    ask at the same time make it once; one that is killed leaves nothing that a later one would trust.
    """
    folder = cache() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that prepares {name} …", file=sys.stderr)
        lock.acquire()
    try:
        if not folder.is_dir():  # it may have been made while we waited
            _make(folder, make)
    finally:
        lock.release()
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    staging = folder.parent / f".staging-{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed: we hold the lock
    staging.mkdir()
    try:
        make(staging)
        for path in (*staging.rglob("*"), staging):
            sync(path)
        staging.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
