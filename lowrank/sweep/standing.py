"""What a job's folder says of it: whether it is done, can be gone on with, is somebody's, or has not begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankError
from lowrank.record import directory, lock
from lowrank.sweep.job import Job
from lowrank.sweep.journal import Journal

NEW, DONE, UNFINISHED, OWNED, OTHER = "new", "done", "unfinished", "owned", "other"


@dataclass(frozen=True)
class Standing:
    state: str
    why: str = ""  # owned: by which process; other: what there is


def standing(job: Job, journal: Journal) -> Standing:
    folder, before = job.folder, journal.latest(job.folder)
    if owner := lock.living(folder):
        return Standing(OWNED, owner)
    if not any((folder / name).exists() for name in directory.RUN):
        return Standing(NEW)
    if not folder.name.endswith(job.origin.digest) and before != job.origin:
        what = f"another one by its {' and '.join(job.origin.differing(before))}" if before else "of another sweep"
        return Standing(OTHER, f"holds a run already ({what}). Give another hydra.sweep.dir.")
    return Standing(DONE if summary(folder).get("status") == "done" else UNFINISHED)


def summary(folder: Path) -> dict[str, Any]:
    """Of a run; empty where there is none, or none that can be read."""
    try:
        return directory.read_json(folder / directory.SUMMARY)
    except (LowrankError, OSError):
        return {}


def write_failed(folder: Path, cause: str, command: str) -> None:
    """The summary of a job that could not write one: it refused to start, or was killed."""
    directory.write_json(folder / directory.SUMMARY, {"status": "failed", "error": cause, "command": command})


def number(folder: Path, name: str) -> float:
    """The number at a dotted name of a run's summary. Raises LowrankError where there is none, or it is not finite."""
    found: Any = summary(folder)
    for key in name.split("."):
        if not isinstance(found, dict) or key not in found:
            allowed = f" (there: {', '.join(found)})" if isinstance(found, dict) else ""
            raise LowrankError(f"sweep.metric: no '{name}' in summary.json{allowed}.")
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise LowrankError(f"sweep.metric: '{name}' is no finite number in summary.json.")
    return float(found)
