"""``lowrank verify``: every file of a run that has a hash, read again. Loads neither torch nor a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank import manifest
from lowrank.disk import Written, starts_as
from lowrank.errors import ConfigError
from lowrank.record import directory

INDEX, STATE = "index.json", "state.json"
HELD = (directory.CONFIG, directory.CHECKPOINTS, directory.ADAPTER, directory.METRICS)  # any of them is a run's
PLACE = {"bytes": int, "sha256": str}


@dataclass(frozen=True)
class Found:
    """One thing that was looked at, and all that is wrong with it: a sentence a file."""

    what: str
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.faults) or self.what


def verify(run: Path) -> Iterator[Found]:
    """One after another: checkpoints, the files that grow, the final adapter. Raises ConfigError for no run."""
    if not any((run / name).exists() for name in HELD):
        raise ConfigError(f"{run}: not a run directory (no {directory.CONFIG} there).")
    newest: Path | None = None
    yield from announced(run / directory.CHECKPOINTS)
    for path in manifest.committed(run / directory.CHECKPOINTS):
        found = whole(path)
        if path.is_dir():  # else a run that goes on has removed it meanwhile
            yield found
            newest = newest if found.faults else path
    if newest is not None:
        yield from lines(run, newest)
    yield adapter(run)


def announced(folder: Path) -> Iterator[Found]:
    """What is missing altogether."""
    missing = [name for name in named(folder) if not (folder / name).is_dir()]
    if missing:
        yield Found(INDEX, tuple(f"{folder.name}/{name}: missing" for name in missing))
    elif not manifest.committed(folder):
        yield Found(f"{folder.name}: none")


def named(folder: Path) -> list[str]:
    """The checkpoints that index.json tells of: it is written before another one goes."""
    index = read(folder / INDEX)
    return sorted({name for name in index.values() if isinstance(name, str) and manifest.STEP.fullmatch(name)})


def whole(path: Path) -> Found:
    wrong = tuple(manifest.faults(path))
    files = [] if wrong else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    shown = f"{path.parent.name}/{path.name}" if manifest.STEP.fullmatch(path.name) else path.name
    return Found(f"{shown}: {len(files)} files of {size:,} bytes are what was written", wrong)


def lines(run: Path, newest: Path) -> Iterator[Found]:
    """The files that grow, up to where they were when the newest good checkpoint was made."""
    state = read(newest / STATE)
    for what, name in (("metrics", directory.METRICS), ("digests", directory.DIGESTS)):
        place = state.get(what)
        if isinstance(place, dict) and {key: type(value) for key, value in place.items()} == PLACE:
            yield begins(run / name, Written(**place), newest.name)


def begins(path: Path, place: Written, step: str) -> Found:
    first = f"{path.name}: the first {place.bytes:,} bytes"
    if starts_as(path, place):
        return Found(f"{first} are those that {step} was made after")
    fault = f"{first} are not those that {step} was made after" if path.exists() else f"{path.name}: missing"
    return Found(path.name, (fault,))


def adapter(run: Path) -> Found:
    path = run / directory.ADAPTER
    if path.is_dir() or path.is_symlink():
        return whole(path)
    done = read(run / directory.SUMMARY).get("status") == "done"
    return Found(f"{path.name}: none yet", (f"{path.name}: missing",) if done else ())


def read(path: Path) -> dict[str, Any]:
    """Nothing where there is no JSON object."""
    try:
        return manifest.read_json(path)
    except (OSError, ValueError):
        return {}
