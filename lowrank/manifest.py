"""Folders that appear whole or not at all, and in which a flipped bit is found. No torch: to verify takes no time.

Commit: fill ``.staging-…``, each file on the disk; MANIFEST.json with the bytes and SHA-256 of each, sealed with its
own hash, on the disk; rename; the parent on the disk. A folder called ``step-<number>`` is a committed checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank.disk import Written, discard, read_bounded, reading, sync, write

MANIFEST = "MANIFEST.json"
LARGEST = 16 << 20  # bytes of a JSON file that is read: what is larger is none of ours
STEP = re.compile(r"step-(\d+)")
ASIDE = re.compile(r"\.staging-(\d+)-\d+-old")  # a checkpoint that another one is about to replace


@dataclass
class Staging:
    """A folder that is being filled: by ``write``, or by others in ``folder``."""

    folder: Path
    files: dict[str, Written] = field(default_factory=dict)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        self.files[name] = write(self.folder / name, pieces)

    def seal(self, about: dict[str, Any]) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.name not in self.files:  # written by others
                sync(path)
                self.files[path.name] = written(path)
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        write(self.folder / MANIFEST, [sealed({**about, "files": files})])
        sync(self.folder)


@contextmanager
def committing(final: Path, **about: Any) -> Iterator[Staging]:
    """A folder to fill beside ``final``, which takes that name whole; on any exception it goes, and what was there
    stays. ``about`` stands in the manifest. What a crash left of an earlier attempt is removed."""
    beside = f".staging-{final.name.removeprefix('step-')}-"
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True)
        sync(final.parent.parent)
    for left in final.parent.glob(f"{beside}*"):
        discard(left)
    staging = Staging(final.with_name(f"{beside}{os.getpid()}"))
    staging.folder.mkdir()
    try:
        yield staging
        staging.seal(about)
        install(staging.folder, final)
    finally:
        with suppress(OSError):
            discard(staging.folder)


def install(staged: Path, final: Path) -> None:
    """Gives the staged folder its name; one that has it already steps aside first and goes afterwards."""
    old = staged.with_name(f"{staged.name}-old")
    replaced = os.path.lexists(final)
    if replaced:
        final.rename(old)
    try:
        staged.rename(final)
    except OSError:
        if replaced:
            old.rename(final)
        raise
    sync(final.parent)
    discard(old)


def give_back(parent: Path) -> list[Path]:
    """Returns each checkpoint that a crash caught between stepping aside and being replaced, under its name again: it
    may be the only one there is."""
    found = []
    for old in sorted(parent.glob(".staging-*-old")):
        name = ASIDE.fullmatch(old.name)
        final = parent / f"step-{name[1]}" if name else old
        if not os.path.lexists(final) and verify(old) is None:
            old.rename(final)
            found.append(final)
    if found:
        sync(parent)
    return found


def remove(folders: Iterable[Path]) -> None:
    """Deletes committed folders: under another name, so that none is ever seen in part."""
    gone = []
    for folder in folders:
        aside = folder.with_name(f".staging-{folder.name.removeprefix('step-')}-{os.getpid()}-gone")
        folder.rename(aside)
        gone.append(aside)
    for parent in {path.parent for path in gone}:
        sync(parent)
    for path in gone:
        discard(path)


def verify(folder: Path) -> str | None:
    """The first thing that is wrong with a committed folder, naming the file, or None."""
    return next(faults(folder), None)


def faults(folder: Path) -> Iterator[str]:
    """All that is wrong with a committed folder, file by file."""
    shown = f"{folder.parent.name}/{folder.name}" if STEP.fullmatch(folder.name) else folder.name
    if folder.is_symlink():
        yield f"{shown}: a link, not a folder"
        return
    try:
        files = listed(read_bounded(folder / MANIFEST, LARGEST))
        there = os.listdir(folder)
    except FileNotFoundError:
        yield f"{shown}/{MANIFEST}: missing"
        return
    except (OSError, ValueError, TypeError):
        yield f"{shown}/{MANIFEST}: not what was written"
        return
    for name in sorted({*files, *there} - {MANIFEST}):
        fault = wrong(folder / name, files.get(name))
        if fault is not None:
            yield f"{shown}/{name if name.isprintable() else ascii(name)}: {fault}"


def listed(raw: bytes) -> dict[str, Written]:
    """The files of a manifest. Raises ValueError or TypeError where it is not one as ``sealed`` writes it."""
    manifest = parse(raw)
    if sealed({name: value for name, value in manifest.items() if name != "sha256"}) != raw:
        raise ValueError("its own hash differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(plain(name) for name in files):
        raise ValueError("it names other things than files beside it")
    return {name: Written(**facts) for name, facts in files.items()}


def plain(name: str) -> bool:
    """Whether a name can only be that of a file in the folder itself."""
    return name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\\0")


def wrong(path: Path, expected: Written | None) -> str | None:
    if path.is_symlink():
        return "a link"
    if expected is None:
        return "not in the manifest"
    try:
        with reading(path) as file:
            same = os.fstat(file.fileno()).st_size == expected.bytes
            same = same and hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "sha256 differs from its manifest"


def newest(folder: Path, after: int = -1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, of a later step than ``after``, and what is wrong with each newer one."""
    found: list[str] = []
    for path in reversed([path for path in committed(folder) if step_of(path) > after]):
        fault = verify(path)
        if fault is None:
            return path, found
        found.append(fault)
    return None, found


def committed(folder: Path) -> list[Path]:
    """Every ``step-<number>`` of the folder, oldest first."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Of a committed checkpoint."""
    return int(path.name.removeprefix("step-"))


def step_in(folder: Path) -> int | None:
    """After which step a committed folder of any name was made, by its manifest; None where that says nothing."""
    try:
        step = read_json(folder / MANIFEST).get("step")
    except (OSError, ValueError):
        return None
    return step if type(step) is int else None


def written(path: Path) -> Written:
    """A file as it is on the disk."""
    with reading(path) as file:
        return Written(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with the hash of itself: a reader writes it again and compares every byte."""
    return canonical({**manifest, "sha256": hashlib.sha256(canonical(manifest)).hexdigest()})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a plain file of bounded size. Raises ValueError or OSError."""
    return parse(read_bounded(path, LARGEST))


def parse(raw: bytes) -> dict[str, Any]:
    """Raises ValueError where it is no JSON object."""
    try:
        found = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found
